"""Whether FP8 log-probs are good enough for this model, asked of the model itself before they are used."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from owpo_megatron.head.head import Head
from owpo_megatron.head.logprobs import ComparableLogProbs
from owpo_megatron.types import LogpMode

log = logging.getLogger(__name__)

ROWS = 256
MAX_MEAN, MAX_P99 = 5e-4, 1e-2  # of abs(logp - exact); w's window is +-0.2 and a small drift 0.002


@dataclass(frozen=True)
class Fp8Error:
    """abs(logp - exact logp) of some rows."""

    mean: float
    p99: float
    rows: int

    @property
    def acceptable(self) -> bool:
        return self.mean <= MAX_MEAN and self.p99 <= MAX_P99


def fp8_error(
    head: Head, h_TH: torch.Tensor, target_T: torch.Tensor, row_mask_T: torch.Tensor | None = None
) -> Fp8Error:
    """The error of refined FP8 on the first 256 rows of the mask, hidden states of real tokens.

    Every rank of the group finds the same, since log-probs are the same bits there.
    """
    rows_T = torch.ones_like(target_T, dtype=torch.bool) if row_mask_T is None else row_mask_T
    chosen = rows_T.nonzero()[:ROWS, 0]
    h_CH, target_C = h_TH[chosen], target_T[chosen]
    exact, refined = (head.logprobs(h_CH, target_C, mode=mode) for mode in ("exact", "fp8_refined"))
    assert isinstance(exact, ComparableLogProbs) and isinstance(refined, ComparableLogProbs)
    gap_C = refined.log_ratio(exact).abs().double()
    if len(chosen) == 0 or not gap_C.isfinite().all():
        return Fp8Error(float("nan"), float("nan"), len(chosen))
    return Fp8Error(gap_C.mean().item(), gap_C.quantile(0.99).item(), len(chosen))


def settled_mode(errors: Sequence[Fp8Error], loud: bool = True) -> LogpMode:
    """ "fp8_refined", or "exact" with a warning where the error on this model is too large, or nothing was measured.

    Args:
        errors: of parts of the tokens, from all data-parallel ranks, in the same order everywhere, so that all ranks
            decide alike.
        loud: log on this rank.
    """
    rows = sum(error.rows for error in errors)
    measured = [error for error in errors if error.rows]
    mean = sum(error.mean * error.rows for error in measured) / max(rows, 1)  # NaN when one of them is
    together = Fp8Error(mean, max((error.p99 for error in measured), default=0.0), rows)
    accepted = rows > 0 and together.acceptable
    if accepted and loud:
        log.info("FP8 log-probs: error %.1e mean, %.1e p99 over %d tokens", together.mean, together.p99, together.rows)
    elif loud:
        log.warning(
            "FP8 log-probs are NOT used: error %.1e mean (at most %.0e), %.1e p99 (at most %.0e) over %d tokens; "
            "log-probs are computed exactly instead",
            together.mean, MAX_MEAN, together.p99, MAX_P99, together.rows,
        )  # fmt: skip
    return "fp8_refined" if accepted else "exact"
