"""Advantages and the curriculum against numbers worked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owpo_megatron.errors import UserError
from owpo_megatron.methods import group_advantages, num_active, top_active


def test_unbiased_by_hand():
    # R = 1 0 0 0: mean 1/4; squares 9/16 + 3/16 = 3/4; /3 = 1/4; std 1/2
    # A = (3/4, -1/4, -1/4, -1/4) / (1/2 + 1e-6)
    advantage = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64))
    scale = 0.5 + 1e-6
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25]], dtype=torch.float64) / scale
    torch.testing.assert_close(advantage, expected, rtol=1e-15, atol=0)


def test_population_by_hand():
    # the same rewards: 3/4 / 4 = 3/16; std sqrt(3)/4
    advantage = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64), std="population")
    scale = math.sqrt(3) / 4 + 1e-6
    expected = torch.tensor([[0.75, -0.25, -0.25, -0.25]], dtype=torch.float64) / scale
    torch.testing.assert_close(advantage, expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("std", ["unbiased", "population"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3])
@pytest.mark.parametrize("group_size", [1, 2, 3, 16])
def test_all_equal_group_is_exactly_zero(std, reward, group_size):
    """0.1 three times has a float32 mean that is not 0.1: the exact zero is not a matter of luck."""
    advantage = group_advantages(torch.full((2, group_size), reward), std=std)
    assert torch.equal(advantage, torch.zeros(2, group_size))


def test_groups_do_not_mix_and_integers_are_accepted():
    rewards = torch.tensor([[1, 0, 1, 0], [5, 5, 5, 5], [0, 0, 0, 1]])
    together = group_advantages(rewards)
    assert together.dtype == torch.float32
    for row in range(3):
        assert torch.equal(together[row], group_advantages(rewards[row : row + 1])[0])


def test_unknown_std_is_refused():
    with pytest.raises(UserError, match="algorithm.advantage_std = sample: use unbiased or population"):
        group_advantages(torch.zeros(1, 2), std="sample")


def test_num_active_by_hand():
    # G = 16 over 6 steps: 16, 13, 10, 7, 4, 1; over 4 steps: 16, 11, 6, 1; over 5: 16, 12.25, 8.5, 4.75, 1
    assert [num_active(step, 6, 16) for step in range(6)] == [16, 13, 10, 7, 4, 1]
    assert [num_active(step, 4, 16) for step in range(4)] == [16, 11, 6, 1]
    assert [num_active(step, 5, 16) for step in range(5)] == [16, 12, 8, 5, 1]
    assert num_active(0, 1, 16) == 16


@given(st.integers(2, 400), st.integers(1, 64))
@settings(deadline=None, max_examples=50)
def test_num_active_is_a_line_from_g_to_one(stage_steps, group_size):
    counts = [num_active(step, stage_steps, group_size) for step in range(stage_steps)]
    assert counts[0] == group_size and counts[-1] == 1
    for step, count in enumerate(counts):
        assert abs(count - (group_size - (group_size - 1) * step / (stage_steps - 1))) <= 0.5 + 1e-9
    assert all(later <= earlier for earlier, later in zip(counts, counts[1:], strict=False))


def test_num_active_outside_its_stage_is_a_bug():
    with pytest.raises(AssertionError, match="step 4 is outside a stage of 4 steps"):
        num_active(4, 4, 16)


def test_top_active_ties_go_to_the_lower_index():
    advantage = torch.tensor([[0.5, -0.5, 0.5, -0.5], [0.1, -0.9, 0.9, 0.2], [0.0, 0.0, 0.0, 0.0]])
    # row 0: four equal sizes -> the first two; row 1: 0.9 twice; row 2: all zero -> the first two
    expected = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    assert torch.equal(top_active(advantage, 2), expected)


@pytest.mark.parametrize("group_size", [2, 16, 64])
def test_top_active_is_per_group_and_stable_for_every_count(group_size):
    """64 wide: an unstable sort of so many equal values would not keep their order."""
    generator = torch.Generator().manual_seed(group_size)
    rewards = torch.randint(0, 2, (5, group_size), generator=generator)
    advantage = group_advantages(rewards)
    for n_act in range(group_size + 1):
        active = top_active(advantage, n_act)
        for row in range(5):
            sizes = advantage[row].abs().tolist()
            best = sorted(range(group_size), key=lambda i: (-sizes[i], i))[:n_act]  # noqa: B023
            assert active[row].nonzero()[:, 0].tolist() == sorted(best)
