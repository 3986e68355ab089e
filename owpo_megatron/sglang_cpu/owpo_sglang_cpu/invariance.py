"""Matrix products whose rows do not depend on the batch: --enable-deterministic-inference on a CPU.

A BLAS library chooses its kernel, and with it the order of summation, by the number of rows. Here rows are multiplied
in blocks of one size, as one batched product, so that a row's bits depend on the row alone. The batch has at least one
block per thread: with fewer, MKL splits a single product, and its sums, among the threads. On a GPU SGLang does the
same with Triton kernels. The other reductions of a layer are per row already: normalisation and softmax run along
contiguous rows, and attention is rounded once from float64 (attention.py).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

# Rows multiplied together; the last block is padded with zeros.
BLOCK = 16

_libraries: list[torch.library.Library] = []


def enable(*args: Any, **kwargs: Any) -> None:
    """Replace aten::mm and aten::addmm on the CPU, for this process, in place of enable_batch_invariant_mode."""
    if _libraries:
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
    blocks = max(-(-rows // BLOCK), torch.get_num_threads())
    if rows < blocks * BLOCK:
        a = torch.cat([a, a.new_zeros(blocks * BLOCK - rows, inner)])
    product = torch.bmm(a.reshape(blocks, BLOCK, inner), b.expand(blocks, -1, -1))
    return product.view(blocks * BLOCK, -1)[:rows]


def addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    """Compute beta * bias + alpha * (a @ b), with `mm`."""
    return beta * bias + alpha * mm(a, b)
