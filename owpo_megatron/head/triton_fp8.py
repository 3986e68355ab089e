"""FP8 log-probs on a GPU: the FP8 GEMM of fp8.py, Triton statistics, candidates found while the softmax is summed.

Under TRITON_INTERPRET=1 the same classes run on a CPU. Not run on a GPU yet.
Shapes: R rows that take part, C rows of a chunk, H hidden, V columns on this rank, N refined columns of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from owpo_megatron.head import triton_ops
from owpo_megatron.head.fp8 import CANDIDATES, Fp8Weight, whole_tiles
from owpo_megatron.head.shard import RowStats
from owpo_megatron.head.tail import TailError
from owpo_megatron.head.triton_backend import TritonBackend, TritonLogits


class TritonFp8Backend(TritonBackend):
    """TritonBackend whose logits are in FP8, refined or raw; see Fp8Backend."""

    def __init__(self, weight_VH: torch.Tensor, fp8_weight: Fp8Weight, inverse_temperature: float, refine: bool):
        super().__init__(weight_VH, inverse_temperature)
        self._fp8_weight = fp8_weight
        parts = (self._weight_VH, fp8_weight.values_VH, fp8_weight.scale)
        self._moments = triton_ops.weight_moments(*parts) if refine else None

    def chunks(
        self, h_RH: torch.Tensor, column_R: torch.Tensor, slices: Sequence[slice], keeps_logits: bool = False
    ) -> Iterator[TritonLogits]:
        h_RH = h_RH.to(self._weight_VH.dtype)
        longest = max((chunk.stop - chunk.start for chunk in slices), default=0)
        columns = len(self._weight_VH)
        buffer_CV = h_RH.new_empty(whole_tiles(longest), whole_tiles(columns), dtype=torch.float32)
        for chunk in slices:
            h_CH, column_C = h_RH[chunk], column_R[chunk]
            common = (column_C, self._inverse_temperature, self._weight_VH.dtype)
            if self._moments is None:
                yield TritonLogits(self._fp8_weight.logits(h_CH, buffer_CV), *common)
                continue
            logits_CV, quantised_CH = self._fp8_weight.screened(h_CH, buffer_CV)
            error = triton_ops.tail_error(h_CH, quantised_CH.contiguous(), self._moments)
            del quantised_CH
            exact = partial(triton_ops.gather_dot, h_CH, self._weight_VH)
            yield RefinedLogits(logits_CV, *common, exact, error)


class RefinedLogits(TritonLogits):
    """FP8 logits in memory whose best columns and target are replaced by exact ones.

    The candidates are the best column of each 128-wide tile of the best tiles: found while the softmax is summed, so
    that the logits are read once. The statistics are corrected by what was exchanged, not summed again. All others are
    shifted by one number per row (tail.py). A softmax does not see what its whole row is shifted by, so that in memory
    the exchanged columns are lowered instead, and the statistics are those of the true logits.
    """

    def __init__(
        self, logits_CV: torch.Tensor, column_C: torch.Tensor, inverse_temperature: float, operand: torch.dtype,
        exact: Callable[[torch.Tensor], torch.Tensor], error: TailError | None, candidates: int = CANDIDATES,
    ):  # fmt: skip
        super().__init__(logits_CV, column_C, inverse_temperature, operand)
        self._exact = exact
        self._error = error
        self._shift_C = torch.zeros_like(column_C, dtype=torch.float32)
        self._candidates = candidates

    def stats(self) -> torch.Tensor:
        out_4C, best_CN, tile_column_CN = triton_ops.row_stats(
            self._logits_CV, self._column_C, self._inverse_temperature, candidates=True
        )
        if self._logits_CV.shape[1] == 0:
            return out_4C
        assert best_CN is not None and tile_column_CN is not None
        chosen_CN = best_CN.topk(min(self._candidates, best_CN.shape[1]), dim=1).indices
        here_C = self._column_C >= 0
        target_C1 = self._column_C.clamp(min=0)[:, None]
        column_CN = torch.cat([tile_column_CN.gather(1, chosen_CN).long(), target_C1], dim=1)
        exact_CN = self._exact(column_CN)
        screened_CN = self._logits_CV.gather(1, column_CN) * self._inverse_temperature
        counts_CN = torch.ones_like(column_CN, dtype=torch.bool)
        # A target that is a candidate too is exchanged once; for that of another rank it is column 0.
        counts_CN[:, -1] = (column_CN[:, :-1] != target_C1).all(dim=1)
        max_C, sum_C, _, moment_C = out_4C.unbind(0)
        away_CN = screened_CN - max_C[:, None]
        weight_CN = away_CN.exp().masked_fill(~counts_CN, 0)
        # what FP8 leaves for the tail may come out below zero by rounding
        sum_C = (sum_C - weight_CN.sum(dim=1)).clamp(min=0)
        moment_C = moment_C - (weight_CN * away_CN).sum(dim=1)
        if self._error is not None:
            tail_mean_C = max_C + moment_C / sum_C
            self._shift_C = self._error.shift(tail_mean_C, self._inverse_temperature)
        # of these `dlogits` is formed
        self._logits_CV.scatter_(1, column_CN, exact_CN - (self._shift_C / self._inverse_temperature)[:, None])
        exact_CN = exact_CN * self._inverse_temperature
        old_max_C = max_C + self._shift_C
        max_C = torch.maximum(old_max_C, exact_CN.masked_fill(~counts_CN, -torch.inf).amax(dim=1))
        # the tail's own maximum is lower, but any number of its size does to sum against
        change_C = old_max_C - max_C
        away_CN = exact_CN - max_C[:, None]
        weight_CN = away_CN.exp().masked_fill(~counts_CN, 0)
        moment_C = change_C.exp() * (moment_C + change_C * sum_C) + (weight_CN * away_CN).sum(dim=1)
        sum_C = change_C.exp() * sum_C + weight_CN.sum(dim=1)
        target_C = exact_CN[:, -1].masked_fill(~here_C, 0)
        return torch.stack([max_C, sum_C, target_C, moment_C])

    def log_probs(self, stats: RowStats) -> Iterator[tuple[slice, torch.Tensor]]:
        return super().log_probs(self._in_memory(stats))

    def dlogits(
        self, keep_K: torch.Tensor | None, stats: RowStats, dlogp_C: torch.Tensor, dentropy_C: torch.Tensor | None
    ) -> torch.Tensor:
        return super().dlogits(keep_K, self._in_memory(stats), dlogp_C, dentropy_C)

    def _in_memory(self, stats: RowStats) -> RowStats:
        """The statistics that go with the logits in memory."""
        return replace(stats, lse_C=stats.lse_C - self._shift_C)
