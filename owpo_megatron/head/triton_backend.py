"""The head on a GPU: cuBLAS GEMMs with float32 results and Triton epilogues, one chunk of logits at a time.

A GEMM of this size fills every SM, so a second chunk under way would hide little and cost its memory.
Under TRITON_INTERPRET=1 the same classes run on a CPU, with float32 GEMMs. Not run on a GPU yet.
Shapes: R rows that take part, C rows of a chunk, K kept rows, H hidden, V columns on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from owpo_megatron.head import triton_ops
from owpo_megatron.head.backend import cuda_rows
from owpo_megatron.head.shard import RowStats

_BLOCK_BYTES = 256 << 20  # of float32 logits that a method's own statistic is summed over at a time


class TritonBackend:
    """Implements Backend.

    Args:
        weight_VH: this rank's rows of the output embedding without padding; bfloat16, float16 or float32.
    """

    def __init__(self, weight_VH: torch.Tensor, inverse_temperature: float):
        # a CPU has no GEMM with a result wider than its operands
        self._weight_VH = weight_VH if weight_VH.is_cuda else weight_VH.float()
        self._inverse_temperature = inverse_temperature

    def chunk_rows(self, columns: int) -> int:
        return cuda_rows(columns)

    def chunks(
        self, h_RH: torch.Tensor, column_R: torch.Tensor, slices: Sequence[slice], keeps_logits: bool = False
    ) -> Iterator[TritonLogits]:
        h_RH = h_RH.to(self._weight_VH.dtype)
        longest = max((chunk.stop - chunk.start for chunk in slices), default=0)
        buffer_CV = triton_ops.rows_of(longest, len(self._weight_VH), torch.float32, self._weight_VH.device)
        for chunk in slices:
            logits_CV = buffer_CV[: chunk.stop - chunk.start]
            _mm_float32(h_RH[chunk], self._weight_VH.t(), logits_CV)
            yield TritonLogits(logits_CV, column_R[chunk], self._inverse_temperature, self._weight_VH.dtype)

    def dgrad(self, dlogits_KV: torch.Tensor) -> torch.Tensor:
        return torch.mm(dlogits_KV, self._weight_VH)

    def add_wgrad(self, grad_VH: torch.Tensor, dlogits_KV: torch.Tensor, h_KH: torch.Tensor) -> None:
        h_KH = h_KH.to(dlogits_KV.dtype)
        if dlogits_KV.dtype == torch.float32:
            grad_VH.addmm_(dlogits_KV.t(), h_KH)
        else:
            torch.ops.aten.addmm.dtype_out(grad_VH, dlogits_KV.t(), h_KH, torch.float32, out=grad_VH)


class TritonLogits:
    """Implements ChunkLogits over float32 logits in memory, before the temperature."""

    def __init__(
        self, logits_CV: torch.Tensor, column_C: torch.Tensor, inverse_temperature: float, operand: torch.dtype
    ):
        self._logits_CV = logits_CV
        self._column_C = column_C
        self._inverse_temperature = inverse_temperature
        self._operand = operand

    def stats(self) -> torch.Tensor:
        return triton_ops.row_stats(self._logits_CV, self._column_C, self._inverse_temperature)[0]

    def log_probs(self, stats: RowStats) -> Iterator[tuple[slice, torch.Tensor]]:
        """Compute them with torch: what a method makes of them is its own, so no kernel can sum it."""
        rows, columns = self._logits_CV.shape
        size = max(_BLOCK_BYTES // (4 * max(columns, 1)), 1)
        for block in (slice(start, min(start + size, rows)) for start in range(0, rows, size)):
            yield block, self._logits_CV[block] * self._inverse_temperature - stats.lse_C[block, None]

    def dlogits(
        self, keep_K: torch.Tensor | None, stats: RowStats, dlogp_C: torch.Tensor, dentropy_C: torch.Tensor | None
    ) -> torch.Tensor:
        if keep_K is None:
            keep_K = torch.arange(len(self._logits_CV), device=self._logits_CV.device)
        return triton_ops.dlogits(
            self._logits_CV, keep_K, self._column_C, stats.lse_C, stats.entropy_C, dlogp_C, dentropy_C,
            self._inverse_temperature, self._operand,
        )  # fmt: skip


def _mm_float32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
