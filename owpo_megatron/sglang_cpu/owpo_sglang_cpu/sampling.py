"""SGLang's seeded sampling on a CPU: the same hash and the same Gumbel trick, hence the same token as on a GPU.

SGLang draws token = argmax_v(logprob_v + gumbel_v) in float64, where gumbel_v comes from MurmurHash3 of (seed,
position, v). Its hash is a Triton kernel; this is the same arithmetic in NumPy, whose uint32 products wrap as the hash
requires. The draw depends on (seed, position) and the row's log-probs, never on other rows of the batch.

Most draws are decided in float32, at a quarter of the time: with e_v = -log(u_v), gumbel_v = -log(e_v), and the same
token maximises p_v / e_v. Where another token comes within the error bound of the best, the row is drawn again in
float64, so that the token is always SGLang's.

Legend: n rows (requests) of the batch, m vocabulary.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

U32 = npt.NDArray[np.uint32]

# Elements hashed at a time: three uint32 temporaries of this size stay in a core's L2 cache.
BLOCK = 1 << 16
UINT32_MAX = np.iinfo(np.uint32).max
# The clamp is SGLang's: a hash of 0 or 2**32 - 1 would give infinite noise.
SMALLEST = 2.0**-32
# -log(u) in float32 loses digits as u falls: below LEAST, u counts as LEAST, which only makes a token's score too
# large; such a token is never chosen without a second look. Above it the relative error of a score is below 2**-14.
LEAST = 2.0**-10
MOST_EXACT = 6.9  # a little less than -log(LEAST)
NEAR = 1 - 2.0**-12


def install(sampler: Any) -> None:
    """Replace the draws of sglang.srt.layers.sampler."""
    stock = sampler.sampling_from_probs_torch

    def sampling_from_probs_torch(
        probs: torch.Tensor, sampling_seed: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        if sampling_seed is None or positions is None:
            drawn: torch.Tensor = stock(probs, sampling_seed, positions)
            return drawn
        return draw_from_probs(probs, sampling_seed, positions).view(-1).to(torch.int32)

    sampler.sampling_from_probs_torch = sampling_from_probs_torch
    sampler.multinomial_with_seed = multinomial_with_seed


def multinomial_with_seed(logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Draw one index per row.

    Args:
        logprobs: [n, m] log of the (possibly truncated, possibly unnormalised) probabilities.
        seed: [n] integers, used modulo 2**64.
        positions: [n] position of the drawn token in its sequence, used modulo 2**32.

    Returns:
        [n, 1] int64 indices.
    """
    best = logprobs.amax(dim=1, keepdim=True)  # scores in range, whatever the sum of the probabilities is
    return _draw((logprobs - best).exp().float(), logprobs, seed, positions)


def draw_from_probs(probs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`multinomial_with_seed(probs.log(), ...)`, for float32 probabilities; few rows need the logarithm."""
    return _draw(probs, None, seed, positions)


def _draw(
    weights: torch.Tensor, logprobs: torch.Tensor | None, seed: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    n, m = weights.shape
    rows = row_states(seed.numpy().astype(np.uint64), positions.numpy().astype(np.uint32))
    weight, token, clear = weights.numpy(), np.empty(n, np.int64), np.empty(n, np.bool_)
    step = max(1, BLOCK // m)

    def draw(start: int) -> None:
        part = slice(start, start + step)
        token[part], clear[part] = _draw_quickly(weight[part], rows[part])

    starts = range(0, n, step)
    if torch.get_num_threads() == 1 or len(starts) == 1:
        for start in starts:
            draw(start)
    else:
        list(_threads(torch.get_num_threads()).map(draw, starts))  # NumPy lets go of the interpreter's lock
    drawn = torch.from_numpy(token)[:, None]
    if not clear.all():
        index = np.flatnonzero(~clear)
        unclear = torch.from_numpy(index)
        exact = weights[unclear].log() if logprobs is None else logprobs[unclear]
        drawn[unclear] = _draw_exactly(exact, rows[index])
    return drawn


def _draw_quickly(weight: npt.NDArray[np.float32], rows: U32) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """[n] indices in float32, and whether each is beyond doubt."""
    hashed = hash_columns(rows, weight.shape[1])
    # 1 - u, from the integers: u itself near 1, where large noise is, has no digits left in float32
    scores = np.invert(hashed, out=hashed).astype(np.float32)
    scores *= np.float32(-1 / UINT32_MAX)
    np.maximum(scores, np.float32(LEAST - 1), out=scores)
    np.log1p(scores, out=scores)
    np.minimum(scores, np.float32(-SMALLEST), out=scores)
    np.divide(weight, np.negative(scores, out=scores), out=scores)
    token = scores.argmax(axis=1)
    row = np.arange(len(rows))
    best = scores[row, token]
    scores[row, token] = 0
    # comparisons with NaN are False
    is_exact = weight[row, token] < best * np.float32(MOST_EXACT)
    return token, is_exact & (scores.max(axis=1) < best * np.float32(NEAR))


@functools.lru_cache(maxsize=1)
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number)


def _draw_exactly(logprobs: torch.Tensor, rows: U32) -> torch.Tensor:
    """SGLang's arithmetic: [n, 1] indices for [n, m] log-probs and [n] row states."""
    x = torch.from_numpy(hash_columns(rows, logprobs.shape[1]) / np.float64(UINT32_MAX))
    x.log_().clamp_(min=torch.finfo(x.dtype).min, max=-SMALLEST).neg_()
    x.log_().neg_()
    return x.add_(logprobs).argmax(dim=1, keepdim=True)


def row_states(seed: npt.NDArray[np.uint64], positions: U32) -> U32:
    """Return [n] hash states after the blocks that a row shares: low and high half of the seed, then the position."""
    h = np.zeros(seed.shape, np.uint32)
    low, high = (seed & np.uint64(0xFFFFFFFF)).astype(np.uint32), (seed >> np.uint64(32)).astype(np.uint32)
    for block in (low, high, positions):
        h = _mix(h, _scramble(block))
    return h


def hash_columns(rows: U32, m: int) -> U32:
    """Return [n, m] finished hashes: row states mixed with the column's index, then MurmurHash3's avalanche."""
    h = rows[:, None] ^ _scrambled_columns(m)
    shifted = h >> np.uint32(19)
    h <<= np.uint32(13)
    h |= shifted
    h *= np.uint32(5)
    h += np.uint32(0xE6546B64)
    h ^= np.uint32(16)  # bytes hashed: 8 seed, 4 position, 4 column
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, None)):
        np.right_shift(h, np.uint32(shift), out=shifted)
        h ^= shifted
        if factor is not None:
            h *= np.uint32(factor)
    return h


@functools.lru_cache(maxsize=2)
def _scrambled_columns(m: int) -> U32:
    return _scramble(np.arange(m, dtype=np.uint32))


def _scramble(k: U32) -> U32:
    return _rotate(k * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)


def _mix(h: U32, scrambled: U32) -> U32:
    return _rotate(h ^ scrambled, 13) * np.uint32(5) + np.uint32(0xE6546B64)


def _rotate(x: U32, bits: int) -> U32:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))
