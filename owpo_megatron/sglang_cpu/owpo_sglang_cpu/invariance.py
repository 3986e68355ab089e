"""Matrix products whose rows do not depend on the batch: --enable-deterministic-inference on a CPU.

A BLAS library chooses its kernel, and with it the order of summation, by the number of rows. The bits of a row are
therefore defined here as those of a product of `BLOCK` rows, all blocks of a batch multiplied as one batched product
whose parts are one thread's each: they depend on the row alone. A single product of more rows is faster by half, and
often sums in the same order. Where a test, once per shape, finds that it gives the same bits as the blocks, it is used
instead, with the rows padded to one of a few sizes, so that only what was tested runs. On a GPU SGLang does the same
with Triton kernels. The other reductions of a layer are per row already: normalisation and softmax run along contiguous
rows, and attention has parts of a fixed size (decode.py) or is rounded once from float64 (attention.py).
"""

from __future__ import annotations

import functools
import os
import warnings
from typing import Any

import torch

# Rows multiplied together; the last block is padded with zeros.
BLOCK = 16
# A whole product has a multiple of STEP rows, and at most MOST: larger batches are multiplied in parts of MOST.
STEP, MOST = 32, 128
# Weights with more elements are not copied for the test; their products are memory-bound, and blocks cost little.
MAX_TESTED_ELEMENTS = 1 << 26

_libraries: list[torch.library.Library] = []


def enable(*args: Any, **kwargs: Any) -> None:
    """Replace aten::mm and aten::addmm on the CPU, for this process, in place of enable_batch_invariant_mode.

    Nothing happens with OWPO_BATCH_INVARIANT=0: seeds keep their meaning, since this only asks for other products.
    """
    if _libraries or os.environ.get("OWPO_BATCH_INVARIANT") == "0":
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Oo]verriding a previously registered kernel.*")
        library.impl("mm", mm, "CPU")
        library.impl("addmm", addmm, "CPU")
    _libraries.append(library)


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Compute [M, K] @ [K, N]; each row of the result depends on its row of `a` and on `b` alone."""
    rows, inner = a.shape
    if rows == 0 or inner == 0:
        return a.new_zeros(rows, b.shape[1])
    padded = -(-rows // STEP) * STEP
    if not _is_plain(b) or not all(same_bits(size, *_kind(b)) for size in {min(padded, MOST), padded % MOST} - {0}):
        return in_blocks(a, b)
    if rows < padded:
        a = torch.cat([a, a.new_zeros(padded - rows, inner)])
    elif not a.is_contiguous():
        a = a.contiguous()
    product = a.new_empty(padded, b.shape[1])
    for start in range(0, padded, MOST):
        part = slice(start, start + MOST)
        torch.mm(a[part], b, out=product[part])  # mm.out is not replaced
    return product[:rows]


def in_blocks(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same, which defines the bits. There is a block per thread: MKL splits a single product among the threads."""
    rows, inner = a.shape
    blocks = max(-(-rows // BLOCK), torch.get_num_threads())
    if rows < blocks * BLOCK:
        a = torch.cat([a, a.new_zeros(blocks * BLOCK - rows, inner)])
    product = torch.bmm(a.reshape(blocks, BLOCK, inner), b.expand(blocks, -1, -1))
    return product.view(blocks * BLOCK, -1)[:rows]


def addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    """Compute beta * bias + alpha * (a @ b), with `mm`."""
    return beta * bias + alpha * mm(a, b)


def same_bits(rows: int, inner: int, outer: int, transposed: bool, dtype: torch.dtype) -> bool:
    """Whether a product of so many rows has the bits of the blocks, on random numbers; tested once per shape."""
    return _same_bits(rows, inner, outer, transposed, dtype, torch.get_num_threads())


@functools.cache
def _same_bits(rows: int, inner: int, outer: int, transposed: bool, dtype: torch.dtype, threads: int) -> bool:
    if inner * outer > MAX_TESTED_ELEMENTS:
        return False
    generator = torch.Generator().manual_seed(rows)  # SGLang's own random numbers stay as they are
    a = torch.randn(rows, inner, generator=generator).to(dtype)
    b = torch.randn(*((outer, inner) if transposed else (inner, outer)), generator=generator).to(dtype)
    b = b.t() if transposed else b
    whole = torch.mm(a, b, out=a.new_empty(rows, outer))
    return torch.equal(whole, in_blocks(a, b))


def _is_plain(b: torch.Tensor) -> bool:
    return b.is_contiguous() or b.t().is_contiguous()


def _kind(b: torch.Tensor) -> tuple[int, int, bool, torch.dtype]:
    """(K, N, whether it is the transpose of what lies in memory, dtype)."""
    return b.shape[0], b.shape[1], not b.is_contiguous(), b.dtype
