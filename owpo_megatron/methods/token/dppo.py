"""DPPO: a trust region in probabilities instead of ratios, which are large wherever a probability is small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, Terms
from owpo_megatron.methods.metrics import policy_metrics

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DppoTv(Method):
    """sg(min(r, cap)) A log π; a token leaves once π - π_old has moved too far in the direction of A. As verl's."""

    name = "dppo_tv"
    summary = "sg(min(r, cap)) A log π while π - π_old is within its bounds"
    paper = "arXiv:2602.04879"

    clip_low: float = hyper(0.2, "Largest decrease of a token's probability, for A < 0.", gt=0, lt=1)
    clip_high: float = hyper(0.2, "Largest increase of a token's probability, for A > 0.", gt=0, lt=1)
    cap: float = hyper(20.0, "Largest weight of a token.", gt=1)

    def outside(self, logp_C: torch.Tensor, old_logp_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(too far down, too far up), from detached log-probs."""
        moved_C = logp_C.exp() - old_logp_C.exp()
        return moved_C < -self.clip_low, moved_C > self.clip_high

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        below_C, above_C = self.outside(logp_C.detach(), batch.old_logp_C)
        cut_C = above_C.where(batch.advantage_C > 0, below_C)
        ratio_C = (logp_C.detach() - batch.old_logp_C).exp()
        weight_C = ratio_C.clamp(max=self.cap).masked_fill(cut_C, 0)
        return Terms(weight_C * batch.advantage_C * logp_C, policy_metrics(logp_C, batch, ratio_C, cut_C))


@dataclass(frozen=True)
class DppoKl(DppoTv):
    """The same with the KL of the two outcomes "this token" and "another one" as the distance. As verl's."""

    name = "dppo_kl"
    summary = "sg(min(r, cap)) A log π while the binary KL is within its bounds"

    clip_low: float = hyper(
        0.2, "Largest binary KL(old || policy) of a token that became less probable, for A < 0.", gt=0
    )
    clip_high: float = hyper(
        0.2, "Largest binary KL(old || policy) of a token that became more probable, for A > 0.", gt=0
    )

    def outside(self, logp_C: torch.Tensor, old_logp_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        now_C, old_C = logp_C.exp(), old_logp_C.exp()
        rest_C = (1 - old_C) * ((1 - old_C + 1e-8) / (1 - now_C + 1e-8)).log()
        kl_C = old_C * (old_logp_C - logp_C) + rest_C
        return (kl_C > self.clip_low) & (now_C < old_C), (kl_C > self.clip_high) & (now_C > old_C)
