"""One-Way Policy Optimization: the verifier gives the direction, the reference only scales the step (paper, 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, Terms
from owpo_megatron.methods.metrics import (
    directional_deviation,
    policy_metrics,
    reference_metrics,
    turned_metrics,
    weight_metrics,
)
from owpo_megatron.methods.surrogate import clipped_surrogate, surrogate_push

if TYPE_CHECKING:
    import torch


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
        logp_ref_T: log-probs of the reference, from the same kernel; read only where `active_T`.
        advantage_T: only its sign is used; 0 gives w = 1.
        active_T: bool; inactive tokens get exactly 1.

    Returns:
        [T], exactly 1 where the policy equals the reference.

    Example:
        >>> import torch
        >>> token_weights(torch.tensor([-1.0, -1.0]), torch.tensor([-1.1, -0.9]), torch.ones(2), torch.ones(2).bool())
        tensor([0.9048, 1.1052])
    """
    delta_T = directional_deviation(logp_T, logp_ref_T, advantage_T)
    return bounded_weights(-delta_T, active_T, low, high)


def bounded_weights(log_weight_T: torch.Tensor, active_T: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """clip(exp(log_weight), low, high) for active tokens and exactly 1 for the others."""
    return log_weight_T.exp().clamp(low, high).masked_fill(~active_T, 1)


@dataclass(frozen=True)
class Owpo(Method):
    """w min(r A, clip(r) A), summed over tokens (paper, Eq. 6).

    w uses the current policy of every minibatch, not the sampling policy, unless `weight_policy` is old. With w = 1
    everywhere (right after a swap of the reference, or no active sample) loss and gradient equal DAPO's bit for bit.
    """

    name = "owpo"
    summary = "w S for active samples, S for the others"
    paper = "arXiv:2605.22156, Eq. 5-7, Alg. 1"
    groups = "mixed"
    reference = "active"
    idle_without_advantage = True

    clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    clip_high: float = hyper(0.28, "Upper clip range of the ratio.", gt=0)
    weight_low: float = hyper(0.8, "Lower bound of the weight w.", gt=0, le=1)
    weight_high: float = hyper(1.2, "Upper bound of the weight w.", ge=1)
    weight_policy: str = hyper(
        "current", "Policy in w: the current one, or the old one, of the step's start.", choices=("current", "old")
    )

    def log_weight(self, delta_C: torch.Tensor) -> torch.Tensor:
        """log w before clipping, from the directional deviation; the ablations change this line alone."""
        return -delta_C

    def policy_of_weights(self, logp_C: torch.Tensor, batch: ChunkBatch) -> torch.Tensor:
        """Log-probs [C] that w compares with the reference's: Eq. 5's theta, or Algorithm 1's before the update."""
        return batch.old_logp_C if self.weight_policy == "old" else logp_C

    def weights(self, logp_C: torch.Tensor, batch: ChunkBatch) -> torch.Tensor:
        """w [C], detached."""
        delta_C = directional_deviation(self.policy_of_weights(logp_C, batch), batch.ref_logp_C, batch.advantage_C)
        return bounded_weights(self.log_weight(delta_C), batch.active_C, self.weight_low, self.weight_high)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        surrogate = clipped_surrogate(logp_C, batch, self.clip_low, self.clip_high)
        weight_C = self.weights(logp_C, batch)
        direct_C = surrogate_push(surrogate, batch.advantage_C)
        metrics = (
            policy_metrics(logp_C, batch, surrogate.ratio_C, surrogate.clipped_C)
            | reference_metrics(logp_C, batch, batch.active_C, weight_C * direct_C)
            | turned_metrics(logp_C, batch, batch.active_C, direct_C)
            | weight_metrics(weight_C, batch, self.weight_low, self.weight_high)
        )
        return Terms(weight_C * surrogate.value_C, metrics)
