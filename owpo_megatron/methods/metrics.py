"""What an objective reports of its tokens: detached float64 sums, which add over microbatches and ranks.

Every metric is a scalar unless said. "Reference tokens" are the response tokens that have a reference log-prob: those
of active samples for the OWPO family, all for the other methods with a reference.

| name | summed over | each token adds |
|---|---|---|
| tokens | response tokens | 1 |
| ratio_sum | response tokens | r = exp(logp - old_logp) |
| kl_old_sum | response tokens | old_logp - logp (k1 estimate of KL(old || policy)) |
| clip_count | response tokens | 1 where clipping really cut the gradient (or dropped the token: opd, mopd) |
| ref_tokens | reference tokens | 1 |
| kl_ref_sum | reference tokens | logp - ref_logp (k1 estimate of KL(policy || reference)) |
| abs_log_ratio_sum | reference tokens | abs(logp - ref_logp) |
| abs_delta_sum | reference tokens | abs(delta), delta = sgn(A) (logp - ref_logp) (paper, Eq. 5) |
| case_1 .. case_4 | reference tokens | 1 in that case of the paper's Table 1; tokens with delta = 0 are in none |
| delta_hist | reference tokens with A != 0 | [16] counts of delta in equal bins over [-0.5, 0.5], open at both ends |
| reversed_count | reference tokens | 1 where the gradient moves the token against the sign of A (force reversal) |
| active_tokens | active tokens (OWPO family) | 1 |
| w_sum | response tokens (OWPO family) | w, 1 for inactive tokens |
| w_at_low, w_at_high | active tokens (OWPO family) | 1 where w sits at that bound |

run/metrics.py divides them into the means of a run's log.
"""

from __future__ import annotations

import torch

from owpo_megatron.types import TokenBatch

DELTA_BINS = 16
DELTA_RANGE = 0.5  # the histogram spans [-0.5, 0.5]: w's window is about [-0.18, 0.22]


def directional_deviation(logp_T: torch.Tensor, ref_logp_T: torch.Tensor, advantage_T: torch.Tensor) -> torch.Tensor:
    """delta = sgn(A) (logp - ref_logp), detached; sgn(0) = 0 (paper, Eq. 5). Positive: ahead of the reference."""
    return torch.sign(advantage_T) * (logp_T.detach() - ref_logp_T)


def _total(value_T: torch.Tensor, where_T: torch.Tensor) -> torch.Tensor:
    return value_T.double().masked_fill(~where_T, 0).sum()


def policy_metrics(
    logp_T: torch.Tensor, batch: TokenBatch, ratio_T: torch.Tensor, cut_T: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sums that every method has; `cut_T` marks the tokens whose gradient clipping removed."""
    mask_T = batch.mask_T
    return {
        "tokens": mask_T.sum().double(),
        "ratio_sum": _total(ratio_T, mask_T),
        "kl_old_sum": _total(batch.old_logp_T - logp_T.detach(), mask_T),
        "clip_count": (cut_T & mask_T).sum().double(),
    }


def reference_metrics(
    logp_T: torch.Tensor, batch: TokenBatch, has_ref_T: torch.Tensor, push_T: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Sums over the response tokens where `has_ref_T`; `push_T` is d objective / d logp, detached."""
    where_T = batch.mask_T & has_ref_T
    log_ratio_T = logp_T.detach() - batch.ref_logp_T
    delta_T = directional_deviation(logp_T, batch.ref_logp_T, batch.advantage_T)
    good_T, bad_T = where_T & (batch.advantage_T > 0), where_T & (batch.advantage_T < 0)
    above_T, below_T = log_ratio_T > 0, log_ratio_T < 0
    bin_T = ((delta_T + DELTA_RANGE) * (DELTA_BINS / (2 * DELTA_RANGE))).floor().clamp(0, DELTA_BINS - 1)
    bins_B1 = torch.arange(DELTA_BINS, device=bin_T.device, dtype=bin_T.dtype)[:, None]
    return {
        "ref_tokens": where_T.sum().double(),
        "kl_ref_sum": _total(log_ratio_T, where_T),
        "abs_log_ratio_sum": _total(log_ratio_T.abs(), where_T),
        "abs_delta_sum": _total(delta_T.abs(), where_T),
        "case_1": (good_T & above_T).sum().double(),
        "case_2": (good_T & below_T).sum().double(),
        "case_3": (bad_T & above_T).sum().double(),
        "case_4": (bad_T & below_T).sum().double(),
        "delta_hist": ((bin_T == bins_B1) & (good_T | bad_T)).sum(dim=1).double(),
        "reversed_count": (where_T & (torch.sign(push_T) * torch.sign(batch.advantage_T) < 0)).sum().double(),
    }


def weight_metrics(weight_T: torch.Tensor, batch: TokenBatch, low: float, high: float) -> dict[str, torch.Tensor]:
    """Sums over OWPO's weights w."""
    active_T = batch.mask_T & batch.active_T
    return {
        "active_tokens": active_T.sum().double(),
        "w_sum": _total(weight_T, batch.mask_T),
        "w_at_low": (active_T & (weight_T <= low)).sum().double(),
        "w_at_high": (active_T & (weight_T >= high)).sum().double(),
    }
