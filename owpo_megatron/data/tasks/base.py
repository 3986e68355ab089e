"""Base of generated tasks, and the split of their problems into train and test."""

from __future__ import annotations

import random
import zlib
from typing import Protocol

from owpo_megatron.data.problem import Problem, Split


class Task(Protocol):
    """Problems, demonstrations and an alphabet. Stateless: every method returns the same for the same arguments."""

    @property
    def name(self) -> str:
        """Also the domain of its problems, and so the name of its verifier rule."""

    @property
    def alphabet(self) -> str:
        """Every character of its prompts and of sensible responses, each once."""

    @property
    def max_response_tokens(self) -> int:
        """Room for the longest right answer and the end-of-sequence token, at one character per token; with an
        environment, for all turns and observations."""

    def problems(self, split: Split) -> list[Problem]:
        """All problems of a split, in a fixed order; no train problem is a test problem in other words."""

    def demonstrate(self, problem: Problem, rng: random.Random) -> str | list[str]:
        """A response of the demonstrator that the supervised warm-up imitates; it need not be right. Where a task has
        an environment: replies, and between them what they are answered."""


def split_of(key: str) -> Split:
    """Return the split of the problem with this content: one key in ten is test, by a hash that no run changes.

    Give equal problems equal keys (e.g. their numbers sorted), so that a rewording cannot cross the divide.
    """
    return "test" if zlib.crc32(key.encode()) % 10 == 0 else "train"
