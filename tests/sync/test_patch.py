"""Patches of tensors: applied, they give bit for bit what they were made from, whatever the bits are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owpo_megatron.sync.delta.encoding import Patch, apply, bits_of, difference

DTYPES = [torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float64]
# NaNs with payloads of both signs, signalling ones, -0.0, infinities, the smallest subnormals: as bits of 16
BFLOAT16_ODDITIES = [0x7FC0, 0x7FC1, 0xFFFF, 0x7F81, 0x8000, 0x0000, 0x7F80, 0xFF80, 0x0001, 0x8001]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_patch_gives_bit_for_bit_the_new_tensor(data: st.DataObject) -> None:
    """Random bits, so all NaNs are among them; odd sizes, none and all changed, runs of far-apart and close changes."""
    dtype = data.draw(st.sampled_from(DTYPES))
    count = data.draw(st.one_of(st.integers(0, 40), st.sampled_from([255, 256, 257, 1001, 70_003])))
    share = data.draw(st.sampled_from([0.0, 2e-5, 1e-3, 0.01, 0.11, 0.13, 0.5, 0.95, 1.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    old = torch.empty(count, dtype=dtype)
    bits_of(old).view(np.uint8)[:] = rng.integers(0, 256, count * dtype.itemsize, np.uint8)
    new = old.clone()
    changed = rng.random(count) < share
    bits_of(new)[changed] ^= rng.integers(1, 200, int(changed.sum())).astype(bits_of(new).dtype)
    patch = difference(bits_of(old), bits_of(new))
    assert (patch is None) == (not changed.any())
    if patch is None:
        return
    assert patch.nbytes <= new.nbytes
    apply(patch, bits_of(old))
    assert bytes(bits_of(old).data) == bytes(bits_of(new).data)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_what_is_equal_as_numbers_and_not_as_bits_travels(count: int) -> None:
    """-0.0 for 0.0, and one NaN for another; a NaN that stays is no change."""
    old = torch.zeros(1000, dtype=torch.bfloat16)
    bits_of(old)[500] = 0x7FC1
    new = old.clone()
    bits_of(new)[:count] = (BFLOAT16_ODDITIES * 4)[:count]
    patch = difference(bits_of(old), bits_of(new))
    assert patch is not None and patch.values.size == np.count_nonzero(bits_of(new)[:count])
    apply(patch, bits_of(old))
    assert bytes(bits_of(old).data) == bytes(bits_of(new).data)


@pytest.mark.parametrize(
    ("every", "form", "kind"),
    [
        (60_000, "gaps", np.uint16),  # 60,000 in one byte would be 236 of them
        (100, "gaps", np.uint8),
        (5, "bitmap", np.uint8),
        (1, "whole", np.uint8),
    ],
)
def test_the_smallest_form_is_taken(every: int, form: str, kind: type) -> None:
    """One in `every` of 600,000 bfloat16 elements changes. By hand: gaps take 1 or 2 bytes per change, a bitmap
    600,000 / 8."""
    old = np.zeros(600_000, np.uint16)
    new = old.copy()
    new[every - 1 :: every] = 7
    patch = difference(old, new)
    assert patch is not None
    assert (patch.form, patch.where.dtype) == (form, kind)
    changes = 600_000 // every
    places = {"gaps": changes * np.dtype(kind).itemsize, "bitmap": 600_000 // 8, "whole": 0}
    assert patch.nbytes == 2 * changes + places[form]


def test_gaps_by_hand() -> None:
    """Elements 2, 3 and 1004 change: 2, 0 and 1000 unchanged ones come before; 1000 = 255 + 255 + 255 + 235."""
    old = np.zeros(100_000, np.uint8)
    new = old.copy()
    new[[2, 3, 1004]] = 9, 8, 7
    patch = difference(old, new)
    assert patch is not None
    assert patch.where.tolist() == [2, 0, 255, 255, 255, 235] and patch.values.tolist() == [9, 8, 7]


@pytest.mark.parametrize(
    "patch",
    [
        Patch("whole", np.empty(0, np.uint8), np.zeros(1, np.uint16)),
        Patch("whole", np.empty(0, np.uint8), np.zeros(50, np.uint32)),
        Patch("bitmap", np.full(7, 255, np.uint8), np.zeros(51, np.uint16)),
        Patch("bitmap", np.zeros(6, np.uint8), np.zeros(0, np.uint16)),
        Patch("gaps", np.array([3, 47], np.uint8), np.zeros(2, np.uint16)),  # the second one: element 51
        Patch("gaps", np.array([3], np.uint8), np.zeros(2, np.uint16)),
    ],
)
def test_a_patch_of_another_tensor_is_refused_and_writes_nothing(patch: Patch) -> None:
    target = np.arange(50, dtype=np.uint16)
    with pytest.raises((ValueError, IndexError)):
        apply(patch, target)
    assert target.tolist() == list(range(50))
