"""Triton epilogues of the head's GEMM: softmax statistics, exact logits of some columns, what FP8 does to the others,
gradient of the logits.

Every load is widened to float32 at once; nothing is rounded before it is stored. Each has a launcher that takes and
gives torch tensors. They run on a GPU, and on a CPU under TRITON_INTERPRET=1, which checks logic and masking but
neither races nor speed. Not run on a GPU yet.

Shapes: C rows of a chunk, K kept rows, V columns on this rank, N tiles of columns, T tokens.
"""

# Triton reads the kernels' arguments without annotations.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from owpo_megatron.head.tail import Moments, TailError

TILE = 128  # columns that one candidate stands for
TILES = 16  # tiles that a program looks at together: 2,048 columns, so that it waits for memory, not for its reductions
BLOCK = 2048  # columns of one program step of the gradient
MOMENT_ROWS, MOMENT_BLOCK = 1024, 1024  # rows and channels of the weight that a program sums over
TAIL_BLOCK = 512  # channels that a program of the tail's moments looks at together


@triton.jit
def _stats_kernel(
    logits, column, out, best, best_column, rows, columns, readable, stride, inverse_temperature, tiles,
    WITH_CANDIDATES: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """One row a program: online max m, s = sum e^(z - m), q = sum (z - m) e^(z - m), target; best of every tile."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(column + row)
    m = -float("inf")
    s = 0.0
    q = 0.0
    at_target = 0.0
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        c = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
        ok = c < columns
        z = tl.load(logits + row * stride + c, mask=c < readable, other=0.0).to(tl.float32) * inverse_temperature
        z = tl.where(ok, z, -float("inf"))
        top = tl.max(z, 1)
        new = tl.maximum(m, tl.max(top, 0))
        p = tl.exp(z - new)
        # what was summed against the old maximum moves to the new one: e^(m - new), and (z - m) + (m - new)
        shift = tl.where(m == -float("inf"), 0.0, m - new)
        scale = tl.where(m == -float("inf"), 0.0, tl.exp(shift))
        q = scale * (q + shift * s) + tl.sum(tl.sum(tl.where(ok, (z - new) * p, 0.0), 1), 0)
        s = s * scale + tl.sum(tl.sum(p, 1), 0)
        # `ok` too: a target on another rank is -1 and never here, padded lanes hold -inf and must not be read
        at_target += tl.sum(tl.sum(tl.where((c == target) & ok, z, 0.0), 1), 0)
        m = new
        if WITH_CANDIDATES:
            tl.store(best + row * tiles + tile, top, mask=tile < tiles)
            tl.store(best_column + row * tiles + tile, tile * TILE + tl.argmax(z, 1), mask=tile < tiles)
    tl.store(out + row, m)
    tl.store(out + rows + row, s)
    tl.store(out + 2 * rows + row, at_target)
    tl.store(out + 3 * rows + row, q)


@triton.jit
def _dlogits_kernel(
    logits, out, keep, column, lse, entropy, dlogp, dentropy, columns, readable, writable, stride, out_stride,
    inverse_temperature,
    WITH_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of columns of one kept row a program."""
    kept = tl.program_id(0).to(tl.int64)
    row = tl.load(keep + kept).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = c < columns
    z = tl.load(logits + row * stride + c, mask=c < readable, other=0.0).to(tl.float32) * inverse_temperature
    z = tl.where(ok, z, -float("inf"))
    upstream = tl.load(dlogp + row)
    log_p = z - tl.load(lse + row)
    p = tl.exp(log_p)
    gradient = tl.where((c == tl.load(column + row)) & ok, upstream, 0.0) - p * upstream
    if WITH_ENTROPY:
        towards = tl.where(ok, log_p, 0.0) + tl.load(entropy + row)
        gradient -= p * tl.load(dentropy + row) * towards
    gradient = (gradient * inverse_temperature).to(out.dtype.element_ty)
    tl.store(out + kept * out_stride + c, gradient, mask=c < writable)


@triton.jit
def _gather_dot_kernel(
    h, weight, column, out, hidden, columns_per_row, h_stride, weight_stride, BLOCK: tl.constexpr
):  # fmt: skip
    """One exact logit a program: h of a row times one row of the weight, products and sum in float32."""
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    c = tl.load(column + row * columns_per_row + which).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, hidden, BLOCK):
        k = start + tl.arange(0, BLOCK)
        ok = k < hidden
        a = tl.load(h + row * h_stride + k, mask=ok, other=0.0).to(tl.float32)
        b = tl.load(weight + c * weight_stride + k, mask=ok, other=0.0).to(tl.float32)
        total += a * b
    tl.store(out + row * columns_per_row + which, tl.sum(total, 0))


@triton.jit
def _tail_kernel(
    h, quantised, mean, error_mean, variance, covariance, error_variance, out, rows, hidden, h_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Moments of one row's FP8 logits and of their errors a program: five dot products in one reading of the row."""
    row = tl.program_id(0).to(tl.int64)
    m = tl.zeros((BLOCK,), tl.float32)
    em = tl.zeros((BLOCK,), tl.float32)
    v = tl.zeros((BLOCK,), tl.float32)
    c = tl.zeros((BLOCK,), tl.float32)
    ev = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, hidden, BLOCK):
        k = start + tl.arange(0, BLOCK)
        ok = k < hidden
        a = tl.load(h + row * h_stride + k, mask=ok, other=0.0).to(tl.float32)
        q = tl.load(quantised + row * hidden + k, mask=ok, other=0.0)
        e = q - a
        w = tl.load(mean + k, mask=ok, other=0.0)
        m += q * w
        em += e * w + a * tl.load(error_mean + k, mask=ok, other=0.0)
        w = tl.load(variance + k, mask=ok, other=0.0)
        d = tl.load(covariance + k, mask=ok, other=0.0)
        v += q * q * w
        c += q * (e * w + a * d)
        ev += e * (e * w + 2 * a * d) + a * a * tl.load(error_variance + k, mask=ok, other=0.0)
    tl.store(out + row, tl.sum(m, 0))
    tl.store(out + rows + row, tl.sum(em, 0))
    tl.store(out + 2 * rows + row, tl.sum(v, 0))
    tl.store(out + 3 * rows + row, tl.sum(c, 0))
    tl.store(out + 4 * rows + row, tl.sum(ev, 0))


@triton.jit
def _moments_kernel(
    weight, values, scale, out, rows, hidden, weight_stride, values_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the weight's rows a program: W, its error D, W^2, W D and D^2, of quantised W."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1).to(tl.int64)
    ok = k < hidden
    factor = tl.load(scale)
    w_sum = tl.zeros((BLOCK,), tl.float32)
    d_sum = tl.zeros((BLOCK,), tl.float32)
    ww = tl.zeros((BLOCK,), tl.float32)
    wd = tl.zeros((BLOCK,), tl.float32)
    dd = tl.zeros((BLOCK,), tl.float32)
    for row in range(part * ROWS, tl.minimum(part * ROWS + ROWS, rows)):
        bits = tl.load(values + row * values_stride + k, mask=ok, other=0).to(tl.int32)
        # e4m3 as a float32 whose exponent is 120 too small; Ampere has no conversion
        w = ((bits & 127) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        w = tl.where(bits > 127, -w, w) * factor
        d = w - tl.load(weight + row * weight_stride + k, mask=ok, other=0.0).to(tl.float32)
        w_sum += w
        d_sum += d
        ww += w * w
        wd += w * d
        dd += d * d
    at = out + part * 5 * hidden + k
    tl.store(at, w_sum, mask=ok)
    tl.store(at + hidden, d_sum, mask=ok)
    tl.store(at + 2 * hidden, ww, mask=ok)
    tl.store(at + 3 * hidden, wd, mask=ok)
    tl.store(at + 4 * hidden, dd, mask=ok)


def rows_of(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[rows, columns] without values whose rows begin at multiples of 16 elements: 128-bit loads for any vocabulary."""
    return torch.empty(rows, -(-columns // 16) * 16, dtype=dtype, device=device)[:, :columns]


def _whole(matrix: torch.Tensor) -> int:
    """Columns that may be read and written: the padding of `rows_of` too, so that no mask cuts a 128-bit access."""
    padded = -(-matrix.shape[1] // 16) * 16
    return padded if matrix.stride(0) == padded else matrix.shape[1]


def row_stats(
    logits_CV: torch.Tensor, column_C: torch.Tensor, inverse_temperature: float, candidates: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """([4, C] as VocabShard.combine takes it, best logit of every tile [C, N], its column [C, N])."""
    rows, columns = logits_CV.shape
    out_4C = torch.empty(4, rows, dtype=torch.float32, device=logits_CV.device)
    tiles = triton.cdiv(columns, TILE)
    best_CN = torch.empty(rows, tiles, dtype=torch.float32, device=logits_CV.device) if candidates else None
    column_CN = torch.empty(rows, tiles, dtype=torch.int32, device=logits_CV.device) if candidates else None
    if rows == 0:
        return out_4C, best_CN, column_CN
    if columns == 0:
        out_4C.zero_()[0] = torch.finfo(torch.float32).min
        return out_4C, best_CN, column_CN
    _stats_kernel[(rows,)](
        logits_CV, column_C, out_4C, best_CN if candidates else out_4C, column_CN if candidates else out_4C, rows,
        columns, _whole(logits_CV), logits_CV.stride(0), inverse_temperature, tiles, WITH_CANDIDATES=candidates,
        TILE=TILE, TILES=TILES,
    )  # fmt: skip
    return out_4C, best_CN, column_CN


def dlogits(
    logits_CV: torch.Tensor,
    keep_K: torch.Tensor,
    column_C: torch.Tensor,
    lse_C: torch.Tensor,
    entropy_C: torch.Tensor,
    dlogp_C: torch.Tensor,
    dentropy_C: torch.Tensor | None,
    inverse_temperature: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[K, V] in `dtype`; see ChunkLogits.dlogits."""
    kept, columns = len(keep_K), logits_CV.shape[1]
    out_KV = rows_of(kept, columns, dtype, logits_CV.device)
    if kept and columns:
        _dlogits_kernel[(kept, triton.cdiv(columns, BLOCK))](
            logits_CV, out_KV, keep_K, column_C, lse_C, entropy_C, dlogp_C,
            dlogp_C if dentropy_C is None else dentropy_C, columns, _whole(logits_CV), _whole(out_KV),
            logits_CV.stride(0), out_KV.stride(0), inverse_temperature, WITH_ENTROPY=dentropy_C is not None,
            BLOCK=BLOCK,
        )  # fmt: skip
    return out_KV


def gather_dot(h_CH: torch.Tensor, weight_VH: torch.Tensor, column_CN: torch.Tensor) -> torch.Tensor:
    """[C, N] products of each row with its own columns, in float32."""
    rows, wanted = column_CN.shape
    out_CN = torch.empty(rows, wanted, dtype=torch.float32, device=h_CH.device)
    if out_CN.numel():
        _gather_dot_kernel[(rows, wanted)](
            h_CH, weight_VH, column_CN.contiguous(), out_CN, h_CH.shape[1], wanted, h_CH.stride(0),
            weight_VH.stride(0), BLOCK=min(triton.next_power_of_2(h_CH.shape[1]), 1024),
        )  # fmt: skip
    return out_CN


def weight_moments(weight_VH: torch.Tensor, values_VH: torch.Tensor, scale: torch.Tensor) -> Moments:
    """Moments.of in one reading of the weight and of its e4m3 values."""
    rows, hidden = weight_VH.shape
    parts = triton.cdiv(rows, MOMENT_ROWS)
    out = torch.empty(parts, 5, hidden, dtype=torch.float32, device=weight_VH.device)
    if parts:
        _moments_kernel[(triton.cdiv(hidden, MOMENT_BLOCK), parts)](
            weight_VH, values_VH.view(torch.uint8), scale.reshape(1), out, rows, hidden, weight_VH.stride(0),
            values_VH.stride(0), ROWS=MOMENT_ROWS, BLOCK=MOMENT_BLOCK,
        )  # fmt: skip
    return Moments.of_sums(out.sum(dim=0, dtype=torch.float64), rows, torch.float32)


def tail_error(h_CH: torch.Tensor, quantised_CH: torch.Tensor, moments: Moments) -> TailError:
    """Moments.of_rows; `quantised_CH` is contiguous float32."""
    rows, hidden = h_CH.shape
    out_5C = torch.empty(5, rows, dtype=torch.float32, device=h_CH.device)
    if rows:
        _tail_kernel[(rows,)](
            h_CH, quantised_CH, moments.mean_H, moments.error_mean_H, moments.variance_H, moments.covariance_H,
            moments.error_variance_H, out_5C, rows, hidden, h_CH.stride(0), BLOCK=TAIL_BLOCK,
        )  # fmt: skip
    return TailError(*out_5C.unbind(0))
