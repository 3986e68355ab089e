"""How many rows of logits the head holds at a time; without torch or Triton, so that a plan can ask too."""

from __future__ import annotations

TORCH_BYTES = 24 << 20  # of float32 logits on a CPU. Larger chunks are hardly faster from about 100 rows on
CUDA_BYTES = 5 << 29  # 2.5 GB: 4,096 rows of 152 k columns. Fewer rows read and write dW too often


def torch_rows(vocab: int) -> int:
    """For this many rows of the weight on this rank, padding included."""
    return max(TORCH_BYTES // (4 * max(vocab, 1)), 16)


def cuda_rows(vocab: int) -> int:
    """The same on a GPU, a multiple of 128 as the GEMM's tiles."""
    return max(CUDA_BYTES // (4 * max(vocab, 1)) // 128 * 128, 128)
