"""Rewards that are flipped on purpose: how many, which, and that nothing but seed and place decides it."""

from __future__ import annotations

import math

from owpo_megatron.trainer.noise import RewardNoise


def test_the_share_of_flips_is_the_probability() -> None:
    noise = RewardNoise(seed=3, probability=0.15)
    flips = sum(noise.flips(draw, sibling) for draw in range(2500) for sibling in range(8))
    # 20,000 independent flips: standard deviation sqrt(20000 * 0.15 * 0.85) = 50.5; five of them
    assert abs(flips - 3000) < 5 * math.sqrt(20000 * 0.15 * 0.85)


def test_a_flip_depends_on_seed_and_place_alone() -> None:
    places = [(draw, sibling) for draw in range(40) for sibling in range(8)]
    flips = [RewardNoise(1, 0.3).flips(*place) for place in places]
    assert flips == [RewardNoise(1, 0.3).flips(*place) for place in places]
    assert flips != [RewardNoise(2, 0.3).flips(*place) for place in places]
    more = [RewardNoise(1, 0.6).flips(*place) for place in places]
    assert all(there for flip, there in zip(flips, more, strict=True) if flip)  # more noise adds flips, and moves none


def test_a_flip_turns_the_reward_around() -> None:
    noise, none = RewardNoise(1, 0.5), RewardNoise(1, 0.0)
    for draw in range(20):
        assert noise.reward(True, draw, 0) == 1.0 - noise.reward(False, draw, 0)
        assert (none.reward(True, draw, 0), none.reward(False, draw, 0)) == (1.0, 0.0)
