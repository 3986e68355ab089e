"""The head's arithmetic in plain torch: any device, any dtype; float64 is exact to its last digits.

The reference for every other backend. It is also what a CPU trains with, so it makes few passes over the logits.
Shapes: R rows that take part, C rows of a chunk, K kept rows of a chunk, H hidden, V columns on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from owpo_megatron.head.backend import torch_rows, wide
from owpo_megatron.head.shard import RowStats

_BLOCK_BYTES = 2 << 20  # of logits that elementwise work takes at a time: several passes, one trip to memory


class TorchBackend:
    """Implements Backend; operands below float32 are converted, since a CPU has no GEMM with a wider result.

    Args:
        weight_VH: this rank's rows of the output embedding without padding.
    """

    def __init__(self, weight_VH: torch.Tensor, inverse_temperature: float):
        self._weight_VH = weight_VH.to(wide(weight_VH))
        self._inverse_temperature = inverse_temperature

    def chunk_rows(self, columns: int) -> int:
        return torch_rows(columns)

    def chunks(
        self, h_RH: torch.Tensor, column_R: torch.Tensor, slices: Sequence[slice], keeps_logits: bool = False
    ) -> Iterator[TorchLogits]:
        for chunk in slices:
            # no name for the logits here: it would keep them alive beyond TorchLogits.stats
            yield TorchLogits(
                self._logits(h_RH[chunk], column_R[chunk]),
                column_R[chunk],
                self._inverse_temperature,
                keeps_logits,
            )

    def _logits(self, h_CH: torch.Tensor, column_C: torch.Tensor) -> torch.Tensor:
        """[C, V] over the temperature; what a subclass computes in another way."""
        logits_CV = torch.mm(h_CH.to(self._weight_VH.dtype), self._weight_VH.t())
        return logits_CV if self._inverse_temperature == 1 else logits_CV.mul_(self._inverse_temperature)

    def dgrad(self, dlogits_KV: torch.Tensor) -> torch.Tensor:
        return torch.mm(dlogits_KV, self._weight_VH)

    def add_wgrad(self, grad_VH: torch.Tensor, dlogits_KV: torch.Tensor, h_KH: torch.Tensor) -> None:
        grad_VH.addmm_(dlogits_KV.t(), h_KH.to(dlogits_KV.dtype))


class TorchLogits:
    """Implements ChunkLogits in the logits' own memory: `stats` leaves e^(z - max) there, `dlogits` the gradient.

    Elementwise work goes by blocks of rows that fit a core's cache. z - max is kept only where the entropy's gradient
    or `log_probs` needs it: e^(z - max) may have underflowed.
    """

    def __init__(self, logits_CV: torch.Tensor, column_C: torch.Tensor, inverse_temperature: float, keeps_logits: bool):
        self._exp_CV = logits_CV  # logits until `stats`
        self._column_C = column_C
        self._inverse_temperature = inverse_temperature
        self._shifted_CV = torch.empty_like(logits_CV) if keeps_logits else None
        self._max_C = logits_CV.new_full((len(logits_CV),), torch.finfo(logits_CV.dtype).min)

    def stats(self) -> torch.Tensor:
        logits_CV = self._exp_CV
        rows, columns = logits_CV.shape
        out_4C = logits_CV.new_zeros(4, rows)
        out_4C[0] = self._max_C
        if columns == 0:
            return out_4C
        out_4C[2] = logits_CV.gather(1, self._column_C.clamp(min=0)[:, None])[:, 0].masked_fill(self._column_C < 0, 0)
        for block in self._blocks(rows):
            logits_BV = logits_CV[block]
            max_B = logits_BV.amax(dim=1)
            shifted_BV = logits_BV - max_B[:, None]
            exp_BV = torch.exp(shifted_BV, out=logits_BV)
            out_4C[0, block], out_4C[1, block] = max_B, exp_BV.sum(dim=1)
            # a batch of dot products: no further array, and several times faster than multiply and sum
            out_4C[3, block] = torch.bmm(exp_BV[:, None, :], shifted_BV[:, :, None])[:, 0, 0]
            if self._shifted_CV is not None:
                self._shifted_CV[block] = shifted_BV
        self._max_C = out_4C[0]
        return out_4C

    def log_probs(self, stats: RowStats) -> Iterator[tuple[slice, torch.Tensor]]:
        assert self._shifted_CV is not None, "chunks() was called without keeps_logits"
        shift_C1 = (self._max_C - stats.lse_C)[:, None]
        for block in self._blocks(len(shift_C1)):
            yield block, self._shifted_CV[block] + shift_C1[block]

    def dlogits(
        self, keep_K: torch.Tensor | None, stats: RowStats, dlogp_C: torch.Tensor, dentropy_C: torch.Tensor | None
    ) -> torch.Tensor:
        kept = len(dlogp_C) if keep_K is None else len(keep_K)
        out_KV = self._exp_CV[:kept]
        if out_KV.shape[1] == 0:
            return out_KV
        lse_K, max_K, dlogp_K, column_K = (
            value_C if keep_K is None else value_C[keep_K]
            for value_C in (stats.lse_C, self._max_C, dlogp_C, self._column_C)
        )
        scale_K = self._inverse_temperature * (max_K - lse_K).exp()  # e^(z - max) times this is p over the temperature
        if dentropy_C is not None:
            # -p (dlogp + dentropy (log p + entropy)), with log p = (z - max) + (max - lse)
            entropy_K, dentropy_K = (
                value_C if keep_K is None else value_C[keep_K] for value_C in (stats.entropy_C, dentropy_C)
            )
            constant_K = dlogp_K + dentropy_K * (entropy_K + max_K - lse_K)
        for block in self._blocks(kept):
            # Kept rows move up, never down: what a later block reads has not been written over.
            from_B = block if keep_K is None else keep_K[block]
            if dentropy_C is None:
                torch.mul(self._exp_CV[from_B], (-dlogp_K * scale_K)[block, None], out=out_KV[block])
                continue
            assert self._shifted_CV is not None, "chunks() was called without keeps_logits"
            factor_BV = self._shifted_CV[from_B] * dentropy_K[block, None] + constant_K[block, None]
            torch.mul(self._exp_CV[from_B] * factor_BV, -scale_K[block, None], out=out_KV[block])
        here_K = column_K >= 0
        value_K = (dlogp_K * self._inverse_temperature).masked_fill(~here_K, 0)
        return out_KV.scatter_add_(1, column_K.clamp(min=0)[:, None], value_K[:, None])

    def _blocks(self, rows: int) -> list[slice]:
        """Slices of so many rows that one takes about _BLOCK_BYTES."""
        size = max(_BLOCK_BYTES // (self._exp_CV.element_size() * max(self._exp_CV.shape[1], 1)), 1)
        return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
