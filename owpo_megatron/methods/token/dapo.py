"""DAPO: clipped surrogate with asymmetric range, token mean, groups whose rewards differ (paper, Eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, Terms
from owpo_megatron.methods.metrics import policy_metrics
from owpo_megatron.methods.surrogate import clipped_surrogate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dapo(Method):
    """min(r A, clip(r) A), summed over tokens; no reference."""

    name = "dapo"
    summary = "S"
    paper = "arXiv:2503.14476; OWPO Eq. 2"
    groups = "mixed"
    idle_without_advantage = True

    clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    clip_high: float = hyper(0.28, "Upper clip range of the ratio.", gt=0)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        surrogate = clipped_surrogate(logp_C, batch, self.clip_low, self.clip_high)
        return Terms(surrogate.value_C, policy_metrics(logp_C, batch, surrogate.ratio_C, surrogate.clipped_C))
