"""Bitwise patch between two versions of a tensor: made by the trainer, applied next to an engine.

Elements are compared and stored as unsigned integers of their size, so NaNs keep their payloads, -0.0 differs from
0.0, and all dtypes are handled alike. The smallest of three forms is used; n of N elements have changed:

    gaps    [n] values, and for each the count of unchanged elements before it, in 1, 2 or 4 bytes. The largest number
                of that size means "that many, and the gap continues": in one byte, 1000 is 255 255 255 235.
    bitmap  [n] values, and one bit for each of the N elements
    whole   [N] values

When 1 % of bfloat16 elements changed, a patch has about 3.1 bytes for each of them: 1.5 % of the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

Form = Literal["gaps", "bitmap", "whole"]
Bits = np.ndarray[Any, np.dtype[Any]]  # [N] unsigned integers of the element's size
_GAP_TYPES = (np.uint8, np.uint16, np.uint32)


@dataclass(frozen=True)
class Patch:
    """Changes from a tensor's old bits to its new ones; see `apply`."""

    form: Form
    where: Bits  # gaps: uint8, 16 or 32; bitmap: [ceil(N / 8)] uint8; whole: [0]
    values: Bits

    @property
    def nbytes(self) -> int:
        return self.where.nbytes + self.values.nbytes


def bits_of(tensor: torch.Tensor) -> Bits:
    """View a tensor's elements as integers; a copy if the tensor is on a device or not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(f"u{flat.element_size()}")


def difference(old: Bits, new: Bits) -> Patch | None:
    """Return the smallest patch from old to new, None if they are equal. Needs at most about 5 N bytes of memory."""
    changed = old != new
    count, size = int(np.count_nonzero(changed)), new.itemsize
    if count == 0:
        return None
    # a gap takes at least a byte: from N / 8 changed elements on a bitmap is smaller, and positions are not needed
    if 8 * count < new.size:
        positions = np.flatnonzero(changed)
        where = _smallest_gaps(positions)
        if where.nbytes < -(-new.size // 8):
            return Patch("gaps", where, new[positions])
    if count * size + -(-new.size // 8) < new.nbytes:
        return Patch("bitmap", np.packbits(changed), new[changed])
    return Patch("whole", np.empty(0, np.uint8), new)


def apply(patch: Patch, target: Bits) -> None:
    """Write the new values over the old ones.

    Raises:
        ValueError, IndexError: the patch belongs to another tensor; nothing was written.
    """
    if patch.values.dtype != target.dtype:
        raise ValueError(f"values of {patch.values.dtype} for a tensor of {target.dtype}")
    if patch.form == "whole":
        if patch.values.shape != target.shape:  # numpy would broadcast a single value
            raise ValueError(f"{patch.values.size} values for {target.size} elements")
        target[:] = patch.values
        return
    if patch.form == "bitmap":
        if patch.where.size != -(-target.size // 8):
            raise ValueError(f"a bitmap of {patch.where.size} bytes for {target.size} elements")
        positions: Bits = np.unpackbits(patch.where, count=target.size).view(bool)
        expected = int(np.count_nonzero(positions))
    else:
        positions = _positions(patch.where)
        expected = positions.size
    if patch.values.size != expected:
        raise ValueError(f"{patch.values.size} values for {expected} changed elements")
    target[positions] = patch.values


def _smallest_gaps(positions: Bits) -> Bits:
    gaps = np.diff(positions, prepend=-1) - 1
    sizes = {
        kind: (gaps.size + int((gaps // np.iinfo(kind).max).sum())) * np.dtype(kind).itemsize for kind in _GAP_TYPES
    }
    kind = min(sizes, key=lambda kind: sizes[kind])
    full, rest = np.divmod(gaps, np.iinfo(kind).max)
    ends = np.cumsum(full + 1) - 1
    out = np.full(ends[-1] + 1, np.iinfo(kind).max, kind)
    out[ends] = rest
    return out


def _positions(gaps: Bits) -> Bits:
    ends = np.flatnonzero(gaps != np.iinfo(gaps.dtype).max)
    return np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(ends.size)
