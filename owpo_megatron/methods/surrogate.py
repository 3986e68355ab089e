"""The parts that objectives are made of: ratio, clipped surrogate, k3 penalty, and the two normalisers.

Shapes: T packed tokens of a microbatch, S its samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from owpo_megatron.types import TokenBatch


class Surrogate(NamedTuple):
    """The clipped surrogate of PPO, per token; gradient flows to logp through `value_T` alone."""

    value_T: torch.Tensor  # min(r A, clip(r) A), to be maximised
    ratio_T: torch.Tensor  # r, detached
    clipped_T: torch.Tensor  # bool: the clipped branch was taken and the gradient is zero


def clipped_surrogate(logp_T: torch.Tensor, batch: TokenBatch, clip_low: float, clip_high: float) -> Surrogate:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) with r = exp(logp - old_logp) (paper, Eq. 2)."""
    advantage_T = batch.advantage_T
    ratio_T = torch.exp(logp_T - batch.old_logp_T)
    bounded_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    value_T = torch.minimum(ratio_T * advantage_T, bounded_T * advantage_T)
    ratio_T = ratio_T.detach()
    above_T = (ratio_T > 1 + clip_high) & (advantage_T > 0)
    below_T = (ratio_T < 1 - clip_low) & (advantage_T < 0)
    return Surrogate(value_T, ratio_T, above_T | below_T)


def surrogate_push(surrogate: Surrogate, advantage_T: torch.Tensor) -> torch.Tensor:
    """d value / d logp of the clipped surrogate, detached: r A, or 0 where clipped."""
    return torch.where(surrogate.clipped_T, torch.zeros_like(advantage_T), surrogate.ratio_T * advantage_T)


def k3(logp_T: torch.Tensor, ref_logp_T: torch.Tensor) -> torch.Tensor:
    """exp(ref - logp) - (ref - logp) - 1: the low-variance, non-negative estimate of KL(policy || reference)."""
    lag_T = ref_logp_T - logp_T
    return torch.exp(lag_T) - lag_T - 1


def token_sum(value_T: torch.Tensor, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over response tokens (times `batch.weight_T`), and their number: one divisor for the whole minibatch."""
    return _weighted(value_T, batch).masked_fill(~batch.mask_T, 0).sum(), batch.mask_T.sum()


def sample_mean_sum(value_T: torch.Tensor, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over samples of the mean over a sample's response tokens (times `batch.weight_T`), and the number of samples
    that have any.

    Counts are integers and the division is elementwise, so no float is ever scattered: the same inputs give the same
    bits on a GPU too. `sample_T` may hold anything where `mask_T` is False.
    """
    sample_T = batch.sample_T.masked_fill(~batch.mask_T, 0)
    count_S = torch.zeros(batch.num_samples, dtype=torch.int64, device=value_T.device)
    count_S = count_S.index_add(0, sample_T, batch.mask_T.to(torch.int64))
    mean_part_T = _weighted(value_T, batch) / count_S[sample_T].clamp(min=1)
    return mean_part_T.masked_fill(~batch.mask_T, 0).sum(), (count_S > 0).sum()


def _weighted(value_T: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    return value_T if batch.weight_T is None else value_T * batch.weight_T
