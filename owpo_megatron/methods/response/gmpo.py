"""GMPO: the geometric mean of a response's clipped ratios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, SampleView, Terms
from owpo_megatron.methods.metrics import policy_metrics

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gmpo(Method):
    """exp(mean log r) A with log r clipped per token, from above for A > 0 and from below for A < 0.

    As verl's `geo_mean`: the mean over responses; the clip range is that of log r.
    """

    name = "gmpo"
    summary = "exp(mean of clipped log r) A, per response"
    paper = "arXiv:2507.20673"
    coupling = "sample"
    divisor = "samples"

    clip_low: float = hyper(0.4, "Largest decrease of log π that counts, for A < 0.", gt=0)
    clip_high: float = hyper(0.4, "Largest increase of log π that counts, for A > 0.", gt=0)

    def prepare(self, samples: Sequence[SampleView]) -> list[dict[str, float | torch.Tensor]]:
        out: list[dict[str, float | torch.Tensor]] = []
        for one in samples:
            log_ratio_L = one.now_logp_L - one.old_logp_L
            cut_L = self.cut(log_ratio_L, one.advantage_L)
            bounded_L = log_ratio_L.clamp(-self.clip_low, self.clip_high).where(cut_L, log_ratio_L)
            out.append({"ratio": bounded_L.mean().exp()})
        return out

    def cut(self, log_ratio_C: torch.Tensor, advantage_C: torch.Tensor) -> torch.Tensor:
        """Tokens whose log-ratio is clipped: they have no gradient."""
        return (log_ratio_C > self.clip_high) & (advantage_C > 0) | (log_ratio_C < -self.clip_low) & (advantage_C < 0)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        log_ratio_C = logp_C.detach() - batch.old_logp_C
        cut_C = self.cut(log_ratio_C, batch.advantage_C)
        # value: the response's; d value / d logp: the response's ratio times A, over L, which is the divisor's
        own_C = 1 + (logp_C - logp_C.detach()).masked_fill(cut_C, 0)
        value_C = batch.given["ratio"] * batch.advantage_C * own_C
        return Terms(value_C, policy_metrics(logp_C, batch, log_ratio_C.exp(), cut_C))
