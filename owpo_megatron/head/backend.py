"""Interface of the head's backends: logits of a chunk of rows, their statistics, their gradient, and three GEMMs.

And which implementation a device gets, decided here alone.

Shapes: R rows that take part, C rows of a chunk, K kept rows of a chunk, H hidden, V columns on this rank.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from owpo_megatron.head.shard import RowStats

if TYPE_CHECKING:
    from owpo_megatron.head.fp8 import Fp8Weight

BackendName = Literal["auto", "torch", "triton"]
"""auto: triton for CUDA tensors below float64 where Triton is installed, torch for all others."""
TORCH_BYTES = 24 << 20  # of float32 logits on a CPU. Larger chunks are hardly faster from about 100 rows on
CUDA_BYTES = 2 << 30  # 3,456 rows of 152 k columns. Fewer rows read and write dW too often


def torch_rows(vocab: int) -> int:
    """Rows of logits held at a time on a CPU, for a weight of this many rows on this rank, padding included."""
    return max(TORCH_BYTES // (4 * max(vocab, 1)), 16)


def cuda_rows(vocab: int) -> int:
    """The same on a GPU, a multiple of 128 as the GEMM's tiles."""
    return max(CUDA_BYTES // (4 * max(vocab, 1)) // 128 * 128, 128)


def wide(tensor: torch.Tensor) -> torch.dtype:
    """The dtype of sums, logits and results: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class ChunkLogits(Protocol):
    """The logits of one chunk, whatever form they are kept in. `stats` first, `dlogits` last and at most once."""

    def stats(self) -> torch.Tensor:
        """[4, C], see VocabShard.combine."""

    def log_probs(self, stats: RowStats) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, log-probs of this rank's columns [B, V]), block after block; only where `chunks` keeps logits."""

    def dlogits(
        self, keep_K: torch.Tensor | None, stats: RowStats, dlogp_C: torch.Tensor, dentropy_C: torch.Tensor | None
    ) -> torch.Tensor:
        """Gradient of the GEMM's result [K, V], as a GEMM operand, for the kept rows (None: all).

        d logp_y / d z_j = 1[j = y] - p_j and d entropy / d z_j = -p_j (log p_j + entropy), over the temperature.
        """


class Backend(Protocol):
    """Logits of one weight on one kind of device, and what their gradient does to h and the weight."""

    def chunk_rows(self, columns: int) -> int:
        """Rows whose logits exist at the same time for a weight of `columns` rows, unless the caller sets it.

        `columns` counts padding too: it is the same on every tensor-parallel rank, and so must the chunks be, of which
        each is a collective.
        """

    def chunks(
        self, h_RH: torch.Tensor, column_R: torch.Tensor, slices: Sequence[slice], keeps_logits: bool = False
    ) -> Iterator[ChunkLogits]:
        """Logits of each slice of rows in turn; an item dies when the next is asked for.

        Args:
            column_R: the target's column on this rank, -1 where another rank has it.
            keeps_logits: `log_probs`, or a gradient of the entropy, will be asked for.
        """

    def dgrad(self, dlogits_KV: torch.Tensor) -> torch.Tensor:
        """dlogits W, [K, H] in the hidden states' dtype."""

    def add_wgrad(self, grad_VH: torch.Tensor, dlogits_KV: torch.Tensor, h_KH: torch.Tensor) -> None:
        """grad += dlogits^T h, in place, in float32 (float64)."""


def exact_backend(weight_VH: torch.Tensor, inverse_temperature: float, name: BackendName) -> Backend:
    """Choose the backend for log-probs and gradients of a weight without padding."""
    if _use_triton(weight_VH, name):
        from owpo_megatron.head.triton_backend import TritonBackend

        return TritonBackend(weight_VH, inverse_temperature)
    from owpo_megatron.head.torch_backend import TorchBackend

    return TorchBackend(weight_VH, inverse_temperature)


def fp8_backend(
    weight_VH: torch.Tensor, fp8_weight: Fp8Weight, inverse_temperature: float, refine: bool, name: BackendName
) -> Backend:
    """Choose the backend whose logits are in FP8, refined or raw; `fp8_weight` is `weight_VH` quantised."""
    if _use_triton(weight_VH, name):
        from owpo_megatron.head.triton_fp8 import TritonFp8Backend

        return TritonFp8Backend(weight_VH, fp8_weight, inverse_temperature, refine)
    from owpo_megatron.head.fp8 import Fp8Backend

    return Fp8Backend(weight_VH, fp8_weight, inverse_temperature, refine)


def _use_triton(weight_VH: torch.Tensor, name: BackendName) -> bool:
    if name != "auto":
        return name == "triton"
    return weight_VH.is_cuda and weight_VH.dtype != torch.float64 and importlib.util.find_spec("triton") is not None
