"""GiGPO's advantages worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_step_advantages import step

from owpo_megatron.methods import Turn, make_method


def test_turns_in_the_same_state_are_compared() -> None:
    """Two of three episodes are right. First turns share the prompt; the second turns of 0 and 2 share what they saw.

    Returns with γ = 1/2: first turns 1/2, 0, 1/2; second turns in state (7,) 1 and 1, in state (8,) 0 alone.
    z of (1/2, 0, 1/2): deviations (1/6, -1/3, 1/6), std sqrt((1/36 + 1/9 + 1/36) / 2) = 0.288675.
    """
    turns = [[Turn(2, ()), Turn(1, (7,))], [Turn(1, ()), Turn(3, (8,))], [Turn(2, ()), Turn(2, (7,))]]
    view = replace(step([1.0, 0.0, 1.0], lengths=[3, 4, 4]), turns_N=turns)
    found = make_method("gigpo", gamma=0.5).advantages(view)
    whole = 1 / 3**0.5  # z of (1, 0, 1): 1/3 over 1/sqrt(3)
    first = 1 / 6 / 0.2886751
    expected = [
        [whole + first] * 2 + [whole],
        [-2 * whole - 2 * first] + [-2 * whole] * 3,
        [whole + first] * 2 + [whole] * 2,
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.as_tensor(ours).tolist() == pytest.approx(theirs, abs=1e-5)


def test_a_reward_in_the_middle_reaches_the_turns_before_it() -> None:
    """Rewards 0.5, then 0 and 0: returns 0.5; the others' turns are in states of their own."""
    turns = [[Turn(1, (), 0.5), Turn(1, (3,))], [Turn(1, ()), Turn(1, (4,))]]
    view = replace(step([0.5, 0.0], lengths=[2, 2]), turns_N=turns)
    found = [torch.as_tensor(one).tolist() for one in make_method("gigpo", omega=1.0).advantages(view)]
    z = 0.5**0.5
    assert found[0] == pytest.approx([2 * z, z], abs=1e-5) and found[1] == pytest.approx([-2 * z, -z], abs=1e-5)


def test_without_the_turns_part_it_is_grpo() -> None:
    view = step([1.0, 0.0, 0.0, 1.0], lengths=[2, 1, 3, 1])
    found = make_method("gigpo", omega=0.0).advantages(view)
    for ours, theirs, length in zip(found, make_method("grpo").advantages(view), view.length_N, strict=True):
        assert torch.as_tensor(ours).tolist() == pytest.approx([theirs] * length, abs=1e-6)
