"""GRPO: clipped surrogate and k3 penalty, mean over the tokens of a sample, then over samples (DeepSeekMath)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from owpo_megatron.methods.penalised import penalised_surrogate
from owpo_megatron.methods.surrogate import sample_mean_sum
from owpo_megatron.types import ObjectiveOut, ReferenceNeed, TokenBatch


@dataclass(frozen=True)
class Grpo:
    """min(r A, clip(r) A) - beta k3(logp, ref_logp); every group takes part, the reference is fixed."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 1e-3

    needs_old: ClassVar[bool] = True
    dynamic_sampling: ClassVar[bool] = False

    @property
    def needs_reference(self) -> ReferenceNeed:
        return "all" if self.beta else "none"

    def __call__(self, logp_T: torch.Tensor, batch: TokenBatch) -> ObjectiveOut:
        value_T, metrics = penalised_surrogate(logp_T, batch, self.clip_low, self.clip_high, self.beta)
        total, count = sample_mean_sum(value_T, batch)
        return ObjectiveOut(-total, count, metrics)
