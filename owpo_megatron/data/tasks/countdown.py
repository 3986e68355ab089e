"""Countdown: combine the given numbers with + - * so that they reach the target, using each exactly once."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from owpo_megatron.data.problem import Problem, Split
from owpo_megatron.data.tasks.base import split_of
from owpo_megatron.verifiers.generated_tasks import evaluate, format_answer, parse_answer


@dataclass(frozen=True)
class Countdown:
    """`2,3,7=13:` -> `2*3+7`. Usual precedence; every problem has a solution without parentheses.

    The demonstrator is right and picks one of the solutions at random. Problems are divided by the numbers in sorted
    order and the target, so an order of the numbers seen in training is no test problem.

    Args:
        numbers: how many numbers of one digit a problem has.
        highest_target: targets are 0 to this.
    """

    numbers: int = 3
    highest_target: int = 99

    name = "countdown"
    alphabet = "0123456789+-*(),=:"

    @property
    def max_response_tokens(self) -> int:
        return 2 * self.numbers

    def problems(self, split: Split) -> list[Problem]:
        keys = [
            (numbers, target)
            for numbers in itertools.product(range(1, 10), repeat=self.numbers)
            for target in sorted({value for _, value in _expressions(tuple(sorted(numbers)))})
            if 0 <= target <= self.highest_target and split_of(format_answer(sorted(numbers), target)) == split
        ]
        random.Random(f"countdown/{self.numbers}/{split}").shuffle(keys)
        problems = []
        for index, (numbers, target) in enumerate(keys):
            text = format_answer(numbers, target)
            problems.append(Problem(f"countdown/{split}/{index}", text + ":", text, self.name))
        return problems

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        numbers, target = parse_answer(problem.answer)
        solutions = [text for text, value in _expressions(tuple(sorted(numbers))) if value == target]
        return rng.choice(solutions)


@cache
def _expressions(numbers: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
    """Every distinct chain of these numbers and + - * with its value, in a fixed order."""
    return tuple((text, evaluate(text)[0]) for text in sorted(set(_chains(numbers))))


def _chains(numbers: tuple[int, ...]) -> Iterator[str]:
    for order in itertools.permutations(numbers):
        for operators in itertools.product("+-*", repeat=len(numbers) - 1):
            yield str(order[0]) + "".join(sign + str(n) for sign, n in zip(operators, order[1:], strict=True))
