"""Rows of a pass: those that take part, their chunks, and those that go through the backward products.

Shapes: T rows (tokens), R rows that take part, C rows of a chunk, K rows with gradient, H hidden.
"""

from __future__ import annotations

from bisect import bisect_left

import torch

from owpo_megatron.methods.loss import Chunk
from owpo_megatron.methods.method import Method
from owpo_megatron.types import TokenBatch


class Rows:
    """The rows that take part, in chunks.

    Args:
        h_TH: hidden states of all rows.
        row_mask_T: bool, rows that take part; None: all.
        live_T: bool, rows that may have a gradient; None: not known before the chunks are computed. On a GPU this and
            `row_mask_T` are read by the host together, once: no chunk has to wait for the one before.
    """

    def __init__(
        self,
        h_TH: torch.Tensor,
        column_T: torch.Tensor,
        row_mask_T: torch.Tensor | None,
        chunk_rows: int,
        live_T: torch.Tensor | None = None,
    ):
        self._total = len(h_TH)
        self._index_R: torch.Tensor | None = None
        self._live_R: torch.Tensor | None = None
        if live_T is not None:
            mask_T = torch.ones_like(live_T) if row_mask_T is None else row_mask_T
            on_host_T, live_on_host_T = torch.stack([mask_T, live_T]).cpu()
            index_R = on_host_T.nonzero()[:, 0]
            live_R = live_on_host_T[index_R].nonzero()[:, 0]
            self._live_places: list[int] = live_R.tolist()
            self._live_R = live_R.to(h_TH.device)
            if row_mask_T is not None:
                self._index_R = index_R.to(h_TH.device)
        elif row_mask_T is not None:
            self._index_R = row_mask_T.nonzero()[:, 0]
        chosen = slice(None) if self._index_R is None else self._index_R
        self.h_RH, self.column_R = h_TH.detach()[chosen], column_T[chosen]
        count = len(self.h_RH)
        self.slices = [slice(start, min(start + chunk_rows, count)) for start in range(0, count, chunk_rows)]

    def places(self, chunk: slice) -> torch.Tensor | slice:
        """Return the indices of a chunk's rows among all rows."""
        return chunk if self._index_R is None else self._index_R[chunk]

    def spread(self, value_R: torch.Tensor) -> torch.Tensor:
        """[T], zero for the rows that do not take part."""
        if self._index_R is None:
            return value_R
        return value_R.new_zeros(self._total).index_copy_(0, self._index_R, value_R)

    def kept(self, chunk: slice, slope: Chunk) -> torch.Tensor | None:
        """Rows of the chunk, [K], that go through the backward products; None: all.

        Where `live_T` was given: those, among which some may turn out to have no gradient (clipped ones); otherwise
        exactly those with a gradient, which the host waits for.
        """
        if self._live_R is None:
            keep_K = _has_gradient(slope).nonzero()[:, 0]
        else:
            first, last = (bisect_left(self._live_places, place) for place in (chunk.start, chunk.stop))
            keep_K = self._live_R[first:last] - chunk.start
        if len(keep_K) == chunk.stop - chunk.start:
            return None
        if self._live_R is not None:
            stray = _has_gradient(slope).index_fill_(0, keep_K, False).any()
            torch._assert_async(~stray, "a token without advantage has a gradient: see Method.idle_without_advantage")
        return keep_K


def may_have_gradient(method: Method, batch: TokenBatch) -> torch.Tensor:
    """[T] bool, from what is known before any log-prob is."""
    if method.idle_without_advantage and not method.has_entropy_bonus:
        return batch.mask_T & (batch.advantage_T != 0)
    return batch.mask_T


def chosen(rows_C: torch.Tensor | slice, keep_K: torch.Tensor | None) -> torch.Tensor | slice:
    """Places of the kept rows among all rows."""
    if keep_K is None:
        return rows_C
    return keep_K + rows_C.start if isinstance(rows_C, slice) else rows_C[keep_K]


def _has_gradient(slope: Chunk) -> torch.Tensor:
    has_C = slope.dlogp_C != 0
    for further_C in (slope.dentropy_C, slope.dkl_C):
        if further_C is not None:
            has_C = has_C | (further_C != 0)
    return has_C
