"""Rewards that are wrong on purpose: how the methods bear a noisy verifier is studied with `verifier.flip`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class RewardNoise:
    """Choice of the rewards to invert, for research: 1 becomes 0 and 0 becomes 1, a graded s becomes 1 - s.

    A pure function of the run's seed, the prompt's place in the stream and the sibling: two methods with one seed meet
    the same noise, and a resumed run meets it again.

    Args:
        seed: the run's seed.
        probability: probability of inverting a reward, independently of the others.
    """

    seed: int
    probability: float

    def flips(self, draw: int, sibling: int) -> bool:
        if not self.probability:
            return False
        digest = hashlib.blake2b(f"flip/{self.seed}/{draw}/{sibling}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.probability * 2**64

    def reward(self, told: float, draw: int, sibling: int) -> float:
        """Return the reward of a response, inverted or not."""
        return 1.0 - told if self.flips(draw, sibling) else float(told)
