"""Rewards that are wrong on purpose: how the methods bear a noisy verifier is studied with `verifier.flip`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class RewardNoise:
    """Which rewards of a run are turned around: 1 becomes 0 and 0 becomes 1.

    A pure function of the run's seed, the prompt's place in the stream and the sibling: two methods with one seed meet
    the same noise, and a resumed run meets it again.

    Args:
        seed: of the run.
        probability: that a reward is flipped, each independently of the others.
    """

    seed: int
    probability: float

    def flips(self, draw: int, sibling: int) -> bool:
        if not self.probability:
            return False
        digest = hashlib.blake2b(f"flip/{self.seed}/{draw}/{sibling}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self.probability * 2**64

    def reward(self, correct: bool, draw: int, sibling: int) -> float:
        """What the trainer is told of a response that is `correct`."""
        return float(correct != self.flips(draw, sibling))
