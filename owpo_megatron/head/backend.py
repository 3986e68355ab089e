"""What a device must offer to the head: logits of a chunk of rows, their statistics, their gradient, and three GEMMs.

Shapes: R rows that take part, C rows of a chunk, K kept rows of a chunk, H hidden, V columns on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from owpo_megatron.head.shard import RowStats


def wide(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of sums, logits and results: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class ChunkLogits(Protocol):
    """The logits of one chunk, whatever form they are kept in. `stats` first, then at most one `dlogits`."""

    def stats(self) -> torch.Tensor:
        """[4, C], see VocabShard.combine."""

    def dlogits(
        self, keep_K: torch.Tensor | None, stats: RowStats, dlogp_C: torch.Tensor, dentropy_C: torch.Tensor | None
    ) -> torch.Tensor:
        """Gradient of the GEMM's result [K, V], as a GEMM operand, for the kept rows (None: all).

        d logp_y / d z_j = 1[j = y] - p_j and d entropy / d z_j = -p_j (log p_j + entropy), over the temperature.
        """


class ForwardBackend(Protocol):
    """Logits of one weight on one kind of device."""

    def chunk_rows(self, columns: int) -> int:
        """Rows whose logits exist at the same time for a weight of `columns` rows, unless the caller says otherwise.

        `columns` counts padding too: it is the same on every tensor-parallel rank, and so must the chunks be, of which
        each is a collective.
        """

    def chunks(
        self, h_RH: torch.Tensor, column_R: torch.Tensor, slices: Sequence[slice], for_entropy_gradient: bool = False
    ) -> Iterator[ChunkLogits]:
        """Logits of each slice of rows in turn; an item dies when the next is asked for.

        `column_R` is the target's column on this rank, -1 where another rank has it.
        """


class Backend(ForwardBackend, Protocol):
    """Logits and their gradients."""

    def dgrad(self, dlogits_KV: torch.Tensor) -> torch.Tensor:
        """dlogits W, [K, H] in the hidden states' dtype."""

    def add_wgrad(self, grad_VH: torch.Tensor, dlogits_KV: torch.Tensor, h_KH: torch.Tensor) -> None:
        """grad += dlogits^T h, in place, in float32 (float64)."""
