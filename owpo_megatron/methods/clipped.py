"""Objectives that advantages are given to: PPO's clipped surrogate, and the plain policy gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Kind, Method, Terms
from owpo_megatron.methods.metrics import policy_metrics
from owpo_megatron.methods.surrogate import clipped_surrogate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Clipped(Method):
    """min(r A, clip(r) A), for subclasses with advantages of their own."""

    kind: ClassVar[Kind] = "advantage"
    idle_without_advantage: ClassVar[bool] = True

    clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    clip_high: float = hyper(0.2, "Upper clip range of the ratio.", gt=0)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        surrogate = clipped_surrogate(logp_C, batch, self.clip_low, self.clip_high)
        return Terms(surrogate.value_C, policy_metrics(logp_C, batch, surrogate.ratio_C, surrogate.clipped_C))


@dataclass(frozen=True)
class PolicyGradient(Method):
    """A log pi, without a ratio, for subclasses with advantages of their own."""

    kind = "advantage"
    idle_without_advantage = True
    needs_old = False

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        return Terms(batch.advantage_C * logp_C)
