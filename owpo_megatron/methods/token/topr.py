"""TOPR: positive examples as in supervised learning, negative ones with a ratio that never exceeds 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, Terms
from owpo_megatron.methods.metrics import policy_metrics

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Topr(Method):
    """A log π for A > 0, sg(clip(r, 0, cap)) A log π otherwise; the ratio per token, as ROLL's form for tokens."""

    name = "topr"
    summary = "A log π, times sg(min(r, cap)) for A ≤ 0"
    paper = "arXiv:2503.14286"
    divisor = "samples"

    cap: float = hyper(1.0, "Largest weight of a token with A <= 0.", gt=0)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        ratio_C = (logp_C.detach() - batch.old_logp_C).exp()
        weight_C = ratio_C.clamp(max=self.cap).masked_fill(batch.advantage_C > 0, 1)
        metrics = policy_metrics(logp_C, batch, ratio_C, ratio_C != ratio_C)
        return Terms(weight_C * batch.advantage_C * logp_C, metrics)
