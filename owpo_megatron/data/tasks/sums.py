"""Add five digits modulo 10, step by step: a small task in which an answer follows from reasoning that can be judged.

The demonstrator writes the running sum after every digit, goes on from what it wrote, and copies the last sum behind
`####` as its answer. Each sum is wrong with a fixed probability. An error mostly spoils the answer, but two can cancel:
so answers are right now and then although the reasoning is not (CoT-Pass@k), and a share of the steps is right in most
wrong responses (process rewards).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from owpo_megatron.data.problem import Problem, Split
from owpo_megatron.data.tasks.base import split_of
from owpo_megatron.verifiers.generated_tasks import SUMS_MARK, running_sums

DIGITS = "0123456789"


@dataclass(frozen=True)
class Sums:
    """`34857=` -> `7507####7`.

    Args:
        length: digits of a problem.
        error: probability that the demonstrator writes another digit than the sum.
        sizes: problems of train and test.
    """

    length: int = 5
    error: float = 0.3
    sizes: tuple[int, int] = (8192, 512)

    name = "sums"
    alphabet = DIGITS + "=#"

    @property
    def max_response_tokens(self) -> int:
        return self.length - 1 + len(SUMS_MARK) + 2

    def problems(self, split: Split) -> list[Problem]:
        rng = random.Random(f"sums/{self.length}/{split}")
        found: dict[str, None] = {}
        while len(found) < self.sizes[split == "test"]:
            digits = "".join(rng.choices(DIGITS, k=self.length))
            if split_of(digits) == split:
                found[digits] = None
        return [
            Problem(f"sums/{split}/{index}", digits + "=", running_sums(digits)[-1], self.name)
            for index, digits in enumerate(found)
        ]

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        written = problem.text[0]
        for digit in problem.text[1 : self.length]:
            right = (int(written[-1]) + int(digit)) % 10
            wrong = (right + rng.randrange(1, 10)) % 10
            written += str(wrong if rng.random() < self.error else right)
        return f"{written[1:]}{SUMS_MARK}{written[-1]}"
