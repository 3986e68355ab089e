"""DAPO: clipped surrogate with asymmetric range, token mean, groups whose rewards differ (paper, Eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from owpo_megatron.methods.metrics import policy_metrics
from owpo_megatron.methods.surrogate import clipped_surrogate, token_sum
from owpo_megatron.types import ObjectiveOut, ReferenceNeed, TokenBatch


@dataclass(frozen=True)
class Dapo:
    """min(r A, clip(r) A), summed over tokens; no reference."""

    clip_low: float = 0.2
    clip_high: float = 0.28

    needs_reference: ClassVar[ReferenceNeed] = "none"
    needs_old: ClassVar[bool] = True
    dynamic_sampling: ClassVar[bool] = True

    def __call__(self, logp_T: torch.Tensor, batch: TokenBatch) -> ObjectiveOut:
        surrogate = clipped_surrogate(logp_T, batch, self.clip_low, self.clip_high)
        total, count = token_sum(surrogate.value_T, batch)
        return ObjectiveOut(-total, count, policy_metrics(logp_T, batch, surrogate.ratio_T, surrogate.clipped_T))
