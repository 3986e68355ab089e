"""Whether an FP8 head is good enough for this model, asked of the model itself before it is used.

Compared with the exact head: the log-probs, and the angle and norm of the gradients of h and of the weight.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from owpo_megatron.head.head import Head
from owpo_megatron.types import LogpMode

log = logging.getLogger(__name__)

ROWS = 256
MAX_MEAN, MAX_P99 = 5e-4, 1e-2  # of abs(logp - exact); w's window is +-0.2 and a small drift 0.002
MIN_COSINE, MAX_NORM_GAP = 0.9999, 2e-3  # of the gradients


@dataclass(frozen=True)
class Overlap:
    """Inner products of a gradient with its exact counterpart; those of parts add up."""

    exact: float = 0.0
    found: float = 0.0
    both: float = 0.0

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(self.exact + other.exact, self.found + other.found, self.both + other.both)

    @property
    def cosine(self) -> float:
        size = math.sqrt(self.exact * self.found)
        return self.both / size if size else float(self.exact == self.found)

    @property
    def norm_gap(self) -> float:
        """abs(norm / exact norm - 1)."""
        return abs(math.sqrt(self.found / self.exact) - 1) if self.exact else float(self.found > 0)


@dataclass(frozen=True)
class HeadError:
    """Refined FP8 against exact on some rows: abs(logp - exact logp), and the gradients."""

    mean: float
    p99: float
    rows: int
    dh: Overlap = Overlap()
    dweight: Overlap = Overlap()

    @property
    def acceptable(self) -> bool:
        gradients = (self.dh, self.dweight)
        return (
            self.mean <= MAX_MEAN
            and self.p99 <= MAX_P99
            and all(one.cosine >= MIN_COSINE and one.norm_gap <= MAX_NORM_GAP for one in gradients)
        )

    def __str__(self) -> str:
        return (
            f"log-prob error {self.mean:.1e} mean (at most {MAX_MEAN:.0e}), "
            f"{self.p99:.1e} p99 (at most {MAX_P99:.0e}); "
            f"cosine of dh {self.dh.cosine:.6f}, of dW {self.dweight.cosine:.6f} (at least {MIN_COSINE}); "
            f"norms off by {self.dh.norm_gap:.1e} and {self.dweight.norm_gap:.1e} (at most {MAX_NORM_GAP:.0e}); "
            f"{self.rows} tokens"
        )


def head_error(
    head: Head, h_TH: torch.Tensor, target_T: torch.Tensor, row_mask_T: torch.Tensor | None = None
) -> HeadError:
    """The error of refined FP8 on the first 256 rows of the mask, hidden states of real tokens.

    The gradients are those of a policy-gradient step whose advantages are +1 and -1 in turn. Every rank of the group
    finds the same. Extra memory: the logits of 256 rows, a few times.
    """
    rows_T = torch.ones_like(target_T, dtype=torch.bool) if row_mask_T is None else row_mask_T
    chosen = rows_T.nonzero()[:ROWS, 0]
    if len(chosen) == 0:
        return HeadError(math.nan, math.nan, 0)
    h_CH, target_C = h_TH[chosen].detach(), target_T[chosen]
    sign_C = torch.ones(len(chosen), dtype=torch.float32, device=h_TH.device)
    sign_C[1::2] = -1
    exact_C, exact_CV, exact_CH = head.slopes(h_CH, target_C, sign_C, "exact")
    found_C, found_CV, found_CH = head.slopes(h_CH, target_C, sign_C, "fp8_refined")
    gap_C = (found_C - exact_C).abs().double()
    if not gap_C.isfinite().all():
        return HeadError(math.nan, math.nan, len(chosen))
    return HeadError(
        gap_C.mean().item(),
        gap_C.quantile(0.99).item(),
        len(chosen),
        _overlap(exact_CH, found_CH),
        _overlap_of_weight(head, exact_CV, found_CV, h_CH),
    )


def settled_mode(errors: Sequence[HeadError], loud: bool = True) -> LogpMode:
    """ "fp8_refined", or "exact" with a warning where the error on this model is too large, or nothing was measured.

    Args:
        errors: of parts of the tokens, from all data-parallel ranks, in the same order everywhere, so that all ranks
            decide alike.
        loud: log on this rank.
    """
    rows = sum(error.rows for error in errors)
    measured = [error for error in errors if error.rows]
    mean = sum(error.mean * error.rows for error in measured) / max(rows, 1)  # NaN when one of them is
    together = HeadError(
        mean,
        max((error.p99 for error in measured), default=0.0),
        rows,
        sum((error.dh for error in measured), Overlap()),
        sum((error.dweight for error in measured), Overlap()),
    )
    accepted = rows > 0 and together.acceptable
    if accepted and loud:
        log.info("FP8 head: %s", together)
    elif loud:
        log.warning("the FP8 head is NOT used, the exact one is: %s", together)
    return "fp8_refined" if accepted else "exact"


def _overlap(exact: torch.Tensor, found: torch.Tensor) -> Overlap:
    exact, found = exact.double(), found.double()
    return Overlap(exact.square().sum().item(), found.square().sum().item(), (exact * found).sum().item())


def _overlap_of_weight(head: Head, exact_CV: torch.Tensor, found_CV: torch.Tensor, h_CH: torch.Tensor) -> Overlap:
    """Overlap of D^T h and E^T h without forming them: <D^T h, E^T h> = sum((D E^T) * (h h^T)), [C, C] products."""
    h_CH, exact_CV, found_CV = h_CH.float(), exact_CV.float(), found_CV.float()
    gram_CC = (h_CH @ h_CH.t()).double()
    pairs = ((exact_CV, exact_CV), (found_CV, found_CV), (exact_CV, found_CV))
    sums = torch.stack([((a_CV @ b_CV.t()).double() * gram_CC).sum() for a_CV, b_CV in pairs])
    return Overlap(*head.shard.sum(sums).tolist())
