"""Metrics of a method per token; the trainer sums them in float64 over response tokens, microbatches and ranks.

"Reference tokens" are those that have a reference log-prob: of active samples for the OWPO family, all for the other
methods with a reference. A token outside its metric's set adds 0.

| name | counted for | each token adds |
|---|---|---|
| tokens | response tokens | 1 (added by the trainer) |
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
| turned_count | reference tokens (owpo, grpo, sym_dapo) | [9] 1 where a symmetric KL would do that, for each of BETAS |
| active_tokens | active tokens (OWPO family) | 1 |
| w_sum | response tokens (OWPO family) | w, 1 for inactive tokens |
| w_at_low, w_at_high | active tokens (OWPO family) | 1 where w is at that bound |

run/metrics.py divides the sums into the means of a run's log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from owpo_megatron.methods.method import ChunkBatch

DELTA_BINS = 16
DELTA_RANGE = 0.5  # the histogram spans [-0.5, 0.5]: w's window is about [-0.18, 0.22]
BETAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # coefficients of the symmetric KL that is asked about


def directional_deviation(logp_C: torch.Tensor, ref_logp_C: torch.Tensor, advantage_C: torch.Tensor) -> torch.Tensor:
    """delta = sgn(A) (logp - ref_logp), detached; sgn(0) = 0 (paper, Eq. 5). Positive: ahead of the reference."""
    return advantage_C.sign() * (logp_C.detach() - ref_logp_C)


def every_row(batch: ChunkBatch) -> torch.Tensor:
    """[C], all True: `has_ref_C` of a method whose every sample has a reference."""
    return batch.active_C | ~batch.active_C


def policy_metrics(
    logp_C: torch.Tensor, batch: ChunkBatch, ratio_C: torch.Tensor, cut_C: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the metrics of methods with a ratio; `cut_C` marks the tokens whose gradient clipping removed."""
    return {"ratio_sum": ratio_C, "kl_old_sum": batch.old_logp_C - logp_C.detach(), "clip_count": cut_C}


def reference_metrics(
    logp_C: torch.Tensor, batch: ChunkBatch, has_ref_C: torch.Tensor, push_C: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the metrics of the tokens where `has_ref_C`; `push_C` is d value / d logp, detached."""
    import torch

    log_ratio_C = logp_C.detach() - batch.ref_logp_C
    delta_C = directional_deviation(logp_C, batch.ref_logp_C, batch.advantage_C)
    good_C, bad_C = has_ref_C & (batch.advantage_C > 0), has_ref_C & (batch.advantage_C < 0)
    above_C, below_C = log_ratio_C > 0, log_ratio_C < 0
    bin_C = ((delta_C + DELTA_RANGE) * (DELTA_BINS / (2 * DELTA_RANGE))).floor().clamp(0, DELTA_BINS - 1)
    bins_B = torch.arange(DELTA_BINS, device=bin_C.device, dtype=bin_C.dtype)
    return {
        "ref_tokens": has_ref_C,
        "kl_ref_sum": log_ratio_C.masked_fill(~has_ref_C, 0),
        "abs_log_ratio_sum": log_ratio_C.abs().masked_fill(~has_ref_C, 0),
        "abs_delta_sum": delta_C.abs().masked_fill(~has_ref_C, 0),
        "case_1": good_C & above_C,
        "case_2": good_C & below_C,
        "case_3": bad_C & above_C,
        "case_4": bad_C & below_C,
        "delta_hist": (bin_C[:, None] == bins_B) & (good_C | bad_C)[:, None],
        "reversed_count": has_ref_C & (push_C.sign() * batch.advantage_C.sign() < 0),
    }


def turned_metrics(
    logp_C: torch.Tensor, batch: ChunkBatch, has_ref_C: torch.Tensor, push_C: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the tokens whose update a symmetric KL to the reference would turn against the verifier, by its beta.

    The penalty beta z^2 / 2 (paper, section 4) turns `push_C`, d value / d logp of the surrogate alone, where
    sgn(A) (push - beta z) < 0. A clipped token is pushed nowhere: any beta turns it where it is ahead of the reference.
    """
    import torch

    z_C = logp_C.detach() - batch.ref_logp_C
    beta_B = torch.tensor(BETAS, device=z_C.device, dtype=z_C.dtype)
    after_CB = push_C[:, None] - beta_B * z_C[:, None]
    return {"turned_count": has_ref_C[:, None] & (after_CB.sign() * batch.advantage_C.sign()[:, None] < 0)}


def weight_metrics(weight_C: torch.Tensor, batch: ChunkBatch, low: float, high: float) -> dict[str, torch.Tensor]:
    """Return the metrics of OWPO's weights w."""
    return {
        "active_tokens": batch.active_C,
        "w_sum": weight_C,
        "w_at_low": batch.active_C & (weight_C <= low),
        "w_at_high": batch.active_C & (weight_C >= high),
    }
