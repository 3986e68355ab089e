"""FP8 log-probs on a GPU: the FP8 GEMM of fp8.py, Triton statistics, candidates found while the softmax is summed.

Under TRITON_INTERPRET=1 the same classes run on a CPU. Not run on a GPU yet.
Shapes: R rows that take part, C rows of a chunk, H hidden, V columns on this rank, N refined columns of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from owpo_megatron.head import triton_ops
from owpo_megatron.head.fp8 import CANDIDATES, Fp8Weight, whole_tiles
from owpo_megatron.head.triton_backend import TritonBackend, TritonLogits


class TritonFp8Backend(TritonBackend):
    """TritonBackend whose logits are in FP8, refined or raw; see Fp8Backend."""

    def __init__(self, weight_VH: torch.Tensor, fp8_weight: Fp8Weight, inverse_temperature: float, refine: bool):
        super().__init__(weight_VH, inverse_temperature)
        self._fp8_weight = fp8_weight
        self._refine = refine

    def chunks(
        self, h_RH: torch.Tensor, column_R: torch.Tensor, slices: Sequence[slice], keeps_logits: bool = False
    ) -> Iterator[TritonLogits]:
        h_RH = h_RH.to(self._weight_VH.dtype)
        longest = max((chunk.stop - chunk.start for chunk in slices), default=0)
        columns = len(self._weight_VH)
        buffer_CV = h_RH.new_empty(whole_tiles(longest), whole_tiles(columns), dtype=torch.float32)
        for chunk in slices:
            h_CH, column_C = h_RH[chunk], column_R[chunk]
            logits_CV = self._fp8_weight.logits(h_CH, buffer_CV)
            common = (logits_CV, column_C, self._inverse_temperature, self._weight_VH.dtype)
            exact = partial(triton_ops.gather_dot, h_CH, self._weight_VH)
            yield RefinedLogits(*common, exact) if self._refine else TritonLogits(*common)


class RefinedLogits(TritonLogits):
    """FP8 logits in memory whose best columns and target are replaced by exact ones.

    The candidates are the best column of each 128-wide tile of the best tiles: found while the softmax is summed, so
    that the logits are read once. The statistics are corrected by what was exchanged, not summed again.
    """

    def __init__(
        self, logits_CV: torch.Tensor, column_C: torch.Tensor, inverse_temperature: float, operand: torch.dtype,
        exact: Callable[[torch.Tensor], torch.Tensor], candidates: int = CANDIDATES,
    ):  # fmt: skip
        super().__init__(logits_CV, column_C, inverse_temperature, operand)
        self._exact = exact
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
        self._logits_CV.scatter_(1, column_CN, exact_CN)  # of which `dlogits` is formed
        exact_CN = exact_CN * self._inverse_temperature
        counts_CN = torch.ones_like(column_CN, dtype=torch.bool)
        # A target that is a candidate too is exchanged once; for that of another rank it is column 0.
        counts_CN[:, -1] = (column_CN[:, :-1] != target_C1).all(dim=1)
        old_max_C, old_sum_C, _, old_moment_C = out_4C.unbind(0)
        max_C = torch.maximum(old_max_C, exact_CN.masked_fill(~counts_CN, -torch.inf).amax(dim=1))
        shift_C = old_max_C - max_C
        sum_C = shift_C.exp() * old_sum_C
        moment_C = shift_C.exp() * (old_moment_C + shift_C * old_sum_C)
        for sign, value_CN in ((-1, screened_CN), (1, exact_CN)):
            away_CN = value_CN - max_C[:, None]
            weight_CN = away_CN.exp().masked_fill(~counts_CN, 0)
            part_C = weight_CN.sum(dim=1)
            # what FP8 leaves for the tail may come out below zero by rounding
            sum_C = (sum_C - part_C).clamp(min=0) if sign < 0 else sum_C + part_C
            moment_C = moment_C + sign * (weight_CN * away_CN).sum(dim=1)
        target_C = exact_CN[:, -1].masked_fill(~here_C, 0)
        return torch.stack([max_C, sum_C, target_C, moment_C])
