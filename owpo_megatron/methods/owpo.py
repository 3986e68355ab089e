"""One-Way Policy Optimization: the verifier gives the direction, the reference only scales the step (paper, 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from owpo_megatron.methods.metrics import directional_deviation, policy_metrics, reference_metrics, weight_metrics
from owpo_megatron.methods.surrogate import clipped_surrogate, surrogate_push, token_sum
from owpo_megatron.types import ObjectiveOut, ReferenceNeed, TokenBatch


def token_weights(
    logp_T: torch.Tensor,
    logp_ref_T: torch.Tensor,
    advantage_T: torch.Tensor,
    active_T: torch.Tensor,
    low: float = 0.8,
    high: float = 1.2,
) -> torch.Tensor:
    """w = clip(exp(-delta), low, high), detached (paper, Eq. 5 and 7).

    Args:
        logp_T: log-probs of the current policy, fp32 or fp64.
        logp_ref_T: of the reference, from the same kernel; read only where `active_T`.
        advantage_T: only its sign is used; 0 gives w = 1.
        active_T: bool; inactive tokens get exactly 1.

    Returns:
        [T], exactly 1 where the policy equals the reference.

    Example:
        >>> token_weights(torch.tensor([-1.0, -1.0]), torch.tensor([-1.1, -0.9]), torch.ones(2), torch.ones(2).bool())
        tensor([0.9048, 1.1052])
    """
    delta_T = directional_deviation(logp_T, logp_ref_T, advantage_T)
    return bounded_weights(-delta_T, active_T, low, high)


def bounded_weights(log_weight_T: torch.Tensor, active_T: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """clip(exp(log_weight), low, high) for active tokens and exactly 1 for the others."""
    weight_T = torch.exp(log_weight_T).clamp(low, high)
    return torch.where(active_T, weight_T, torch.ones_like(weight_T))


@dataclass(frozen=True)
class Owpo:
    """w min(r A, clip(r) A), summed over tokens (paper, Eq. 6).

    w uses the current policy of every minibatch, not the sampling policy. With w = 1 everywhere (right after a swap of
    the reference, or no active sample) loss and gradient equal DAPO's bit for bit.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    weight_low: float = 0.8
    weight_high: float = 1.2

    needs_reference: ClassVar[ReferenceNeed] = "active"
    needs_old: ClassVar[bool] = True
    dynamic_sampling: ClassVar[bool] = True

    def log_weight(self, delta_T: torch.Tensor) -> torch.Tensor:
        """log w before clipping, from the directional deviation; the ablations change this line alone."""
        return -delta_T

    def weights(self, logp_T: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """w [T], detached."""
        delta_T = directional_deviation(logp_T, batch.ref_logp_T, batch.advantage_T)
        return bounded_weights(self.log_weight(delta_T), batch.active_T, self.weight_low, self.weight_high)

    def __call__(self, logp_T: torch.Tensor, batch: TokenBatch) -> ObjectiveOut:
        surrogate = clipped_surrogate(logp_T, batch, self.clip_low, self.clip_high)
        weight_T = self.weights(logp_T, batch)
        total, count = token_sum(weight_T * surrogate.value_T, batch)
        push_T = weight_T * surrogate_push(surrogate, batch.advantage_T)
        metrics = (
            policy_metrics(logp_T, batch, surrogate.ratio_T, surrogate.clipped_T)
            | reference_metrics(logp_T, batch, batch.active_T, push_T)
            | weight_metrics(weight_T, batch, self.weight_low, self.weight_high)
        )
        return ObjectiveOut(-total, count, metrics)
