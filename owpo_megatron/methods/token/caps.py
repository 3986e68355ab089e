"""Two caps that PPO's clip lacks: on the loss of improbable tokens of wrong answers, and on the ratio itself."""

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
class DualClip(Method):
    """max(min(r A, clip(r) A), c A) for A < 0: beyond r = c a token has no gradient. As verl's standard loss."""

    name = "dual_clip"
    summary = "S, at least c A for A < 0"
    paper = "arXiv:1912.09729"

    clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    clip_high: float = hyper(0.2, "Upper clip range of the ratio.", gt=0)
    cap: float = hyper(3.0, "Largest ratio c of tokens with A < 0.", gt=1)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        surrogate, negative_C = clipped_surrogate(logp_C, batch, self.clip_low, self.clip_high), batch.advantage_C < 0
        value_C = surrogate.value_C.maximum(self.cap * batch.advantage_C).where(negative_C, surrogate.value_C)
        cut_C = surrogate.clipped_C | (surrogate.ratio_C > self.cap) & negative_C
        return Terms(value_C, policy_metrics(logp_C, batch, surrogate.ratio_C, cut_C))


@dataclass(frozen=True)
class DeltaClip(Method):
    """min(min(r, δ) A, clip(r) A): the unclipped branch is capped, too, for both signs of A. As TRL's `delta`."""

    name = "delta_clip"
    summary = "min(min(r, δ) A, clip(r) A)"
    paper = "INTELLECT-2, arXiv:2505.07291"

    clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    clip_high: float = hyper(0.2, "Upper clip range of the ratio.", gt=0)
    delta: float = hyper(4.0, "Largest ratio δ of the unclipped branch.", gt=1)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        ratio_C, advantage_C = (logp_C - batch.old_logp_C).exp(), batch.advantage_C
        bounded_C = ratio_C.clamp(1 - self.clip_low, 1 + self.clip_high)
        value_C = (ratio_C.clamp(max=self.delta) * advantage_C).minimum(bounded_C * advantage_C)
        surrogate = clipped_surrogate(logp_C, batch, self.clip_low, self.clip_high)
        cut_C = surrogate.clipped_C | (surrogate.ratio_C > self.delta)
        return Terms(value_C, policy_metrics(logp_C, batch, surrogate.ratio_C, cut_C))
