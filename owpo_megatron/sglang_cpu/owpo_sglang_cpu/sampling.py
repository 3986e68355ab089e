"""SGLang's seeded sampling on a CPU: the same hash and the same Gumbel trick, hence the same token as on a GPU.

SGLang draws token = argmax_v(logprob_v + gumbel_v), where gumbel_v comes from MurmurHash3 of (seed, position, v). Its
hash is a Triton kernel; this is the same arithmetic in NumPy, whose uint32 products wrap as the hash requires. The draw
depends on (seed, position) and the row's log-probs, never on other rows of the batch.

Legend: n rows (requests) of the batch, m vocabulary.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch

U32 = npt.NDArray[np.uint32]

# Elements hashed at a time: three uint32 temporaries of this size stay in a core's L2 cache.
BLOCK = 1 << 16


def multinomial_with_seed(logprobs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Draw one index per row.

    Args:
        logprobs: [n, m] log of the (possibly truncated, possibly unnormalised) probabilities.
        seed: [n] integers, used modulo 2**64.
        positions: [n] position of the drawn token in its sequence, used modulo 2**32.

    Returns:
        [n, 1] int64 indices.
    """
    n, m = logprobs.shape
    rows = row_states(seed.numpy().astype(np.uint64), positions.numpy().astype(np.uint32))
    noise = np.empty((n, m))
    step = max(1, BLOCK // m)
    for start in range(0, n, step):
        noise[start : start + step] = hash_columns(rows[start : start + step], m)
    noise /= np.iinfo(np.uint32).max
    x = torch.from_numpy(noise)
    # The clamp is SGLang's: a hash of 0 or 2**32 - 1 would give infinite noise.
    x.log_().clamp_(min=torch.finfo(x.dtype).min, max=-(2.0**-32)).neg_()
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
    h = _mix(rows[:, None], _scrambled_columns(m))
    h ^= np.uint32(16)  # bytes hashed: 8 seed, 4 position, 4 column
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h


@functools.lru_cache(maxsize=2)
def _scrambled_columns(m: int) -> U32:
    return _scramble(np.arange(m, dtype=np.uint32))


def _scramble(k: U32) -> U32:
    return _rotate(k * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)


def _mix(h: U32, scrambled: U32) -> U32:
    h = _rotate(h ^ scrambled, 13)
    h *= np.uint32(5)
    h += np.uint32(0xE6546B64)
    return h


def _rotate(x: U32, bits: int) -> U32:
    return (x << np.uint32(bits)) | (x >> np.uint32(32 - bits))
