"""The parts that methods share: ratio, clipped surrogate, and the k3 penalty."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from owpo_megatron.methods.method import ChunkBatch, Terms
from owpo_megatron.methods.metrics import every_row, policy_metrics, reference_metrics, turned_metrics

if TYPE_CHECKING:
    import torch


class Surrogate(NamedTuple):
    """The clipped surrogate of PPO, per token; gradient flows to logp through `value_C` alone."""

    value_C: torch.Tensor  # min(r A, clip(r) A), to be maximised
    ratio_C: torch.Tensor  # r, detached
    clipped_C: torch.Tensor  # bool: the clipped branch was taken and the gradient is zero


def clipped_surrogate(logp_C: torch.Tensor, batch: ChunkBatch, clip_low: float, clip_high: float) -> Surrogate:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logp - old_logp) (paper, Eq. 2)."""
    return clipped_ratio((logp_C - batch.old_logp_C).exp(), batch.advantage_C, clip_low, clip_high)


def clipped_ratio(ratio_C: torch.Tensor, advantage_C: torch.Tensor, clip_low: float, clip_high: float) -> Surrogate:
    """The same for a ratio of any kind, e.g. one per sequence."""
    bounded_C = ratio_C.clamp(1 - clip_low, 1 + clip_high)
    value_C = (ratio_C * advantage_C).minimum(bounded_C * advantage_C)
    ratio_C = ratio_C.detach()
    above_C = (ratio_C > 1 + clip_high) & (advantage_C > 0)
    below_C = (ratio_C < 1 - clip_low) & (advantage_C < 0)
    return Surrogate(value_C, ratio_C, above_C | below_C)


def surrogate_push(surrogate: Surrogate, advantage_C: torch.Tensor) -> torch.Tensor:
    """d value / d logp of the clipped surrogate, detached: r A, or 0 where clipped."""
    return (surrogate.ratio_C * advantage_C).masked_fill(surrogate.clipped_C, 0)


def k3(logp_C: torch.Tensor, ref_logp_C: torch.Tensor) -> torch.Tensor:
    """exp(ref - logp) - (ref - logp) - 1: the low-variance, non-negative estimate of KL(policy || reference)."""
    lag_C = ref_logp_C - logp_C
    return lag_C.exp() - lag_C - 1


def k2(logp_C: torch.Tensor, ref_logp_C: torch.Tensor) -> torch.Tensor:
    """(logp - ref)^2 / 2: the quadratic form of a symmetric penalty (OWPO, section 4)."""
    return (logp_C - ref_logp_C).square() / 2


PENALTIES = {"k2": k2, "k3": k3}


def penalised_surrogate(
    logp_C: torch.Tensor, batch: ChunkBatch, clip_low: float, clip_high: float, beta: float, penalty: str = "k3"
) -> Terms:
    """min(r A, clip(r) A) - beta k(logp, ref_logp), k of `PENALTIES`; with beta 0 the reference is never read."""
    surrogate = clipped_surrogate(logp_C, batch, clip_low, clip_high)
    metrics = policy_metrics(logp_C, batch, surrogate.ratio_C, surrogate.clipped_C)
    if beta == 0:
        return Terms(surrogate.value_C, metrics)
    # d k / d logp, the pull-back that may outweigh the verifier's direction; of k3 it is 1 - exp(ref - logp)
    lag_C = batch.ref_logp_C - logp_C.detach()
    pull_C = beta * (-lag_C if penalty == "k2" else 1 - lag_C.exp())
    direct_C = surrogate_push(surrogate, batch.advantage_C)
    metrics |= reference_metrics(logp_C, batch, every_row(batch), direct_C - pull_C)
    metrics |= turned_metrics(logp_C, batch, every_row(batch), direct_C)
    return Terms(surrogate.value_C - beta * PENALTIES[penalty](logp_C, batch.ref_logp_C), metrics)
