"""On-policy distillation: reverse KL to a fixed teacher on the policy's own samples, without a verifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from owpo_megatron.methods.metrics import policy_metrics, reference_metrics
from owpo_megatron.methods.surrogate import sample_mean_sum
from owpo_megatron.types import ObjectiveOut, ReferenceNeed, TokenBatch


def distillation(
    logp_T: torch.Tensor, batch: TokenBatch, clip_low: float, clip_high: float, alpha: float
) -> ObjectiveOut:
    """sg(r) sg(ref_logp - logp + alpha A) logp, mean over the tokens of a sample (paper, Eq. 3 and 4).

    A token whose ratio r leaves [1 - clip_low, 1 + clip_high] is dropped: it stays in the sample's token count and
    adds nothing. The value of the loss has no meaning of its own; its gradient is the policy gradient.
    """
    current_T = logp_T.detach()
    ratio_T = torch.exp(current_T - batch.old_logp_T)
    cut_T = (ratio_T < 1 - clip_low) | (ratio_T > 1 + clip_high)
    push_T = ratio_T * (batch.ref_logp_T - current_T + alpha * batch.advantage_T)
    push_T = push_T.masked_fill(cut_T, 0)
    total, count = sample_mean_sum(push_T * logp_T, batch)
    metrics = policy_metrics(logp_T, batch, ratio_T, cut_T)
    metrics |= reference_metrics(logp_T, batch, torch.ones_like(batch.mask_T), push_T)
    return ObjectiveOut(-total, count, metrics)


@dataclass(frozen=True)
class Opd:
    """sg(r) sg(ref_logp - logp) logp: the advantage is not used."""

    clip_low: float = 0.2
    clip_high: float = 0.28

    needs_reference: ClassVar[ReferenceNeed] = "teacher"
    needs_old: ClassVar[bool] = True
    dynamic_sampling: ClassVar[bool] = False

    def __call__(self, logp_T: torch.Tensor, batch: TokenBatch) -> ObjectiveOut:
        return distillation(logp_T, batch, self.clip_low, self.clip_high, alpha=0.0)
