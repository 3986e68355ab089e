"""Sym-DAPO: DAPO with a symmetric penalty towards the reference, the paper's control group (appendix B.3)."""

from __future__ import annotations

from dataclasses import dataclass

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.token.grpo import Grpo


@dataclass(frozen=True)
class SymDapo(Grpo):
    """min(r A, clip(r) A) - beta k3(logp, ref_logp), summed over tokens; groups and reference are DAPO's and OWPO's."""

    name = "sym_dapo"
    summary = "S - β k3"
    paper = "OWPO B.3, B.4"
    divisor = "tokens"
    groups = "mixed"
    refresh = "interval"

    clip_high: float = hyper(0.28, "Upper clip range of the ratio.", gt=0)
