"""Sym-DAPO: DAPO with a symmetric penalty towards the reference, the paper's control group (appendix B.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, Terms
from owpo_megatron.methods.surrogate import penalised_surrogate
from owpo_megatron.types import ReferenceNeed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SymDapo(Method):
    """min(r A, clip(r) A) - beta k3(logp, ref_logp), summed over tokens."""

    name = "sym_dapo"
    summary = "S - β k3"
    paper = "OWPO B.3, B.4"
    groups = "mixed"
    reference = "all"

    clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    clip_high: float = hyper(0.28, "Upper clip range of the ratio.", gt=0)
    beta: float = hyper(1e-3, "Coefficient β of the penalty.", ge=0)
    penalty: str = hyper("k3", "Form of the penalty: k3, or k2, the quadratic one.", choices=("k2", "k3"))

    @property
    def needs_reference(self) -> ReferenceNeed:
        return "all" if self.beta else "none"

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        return penalised_surrogate(logp_C, batch, self.clip_low, self.clip_high, self.beta, self.penalty)
