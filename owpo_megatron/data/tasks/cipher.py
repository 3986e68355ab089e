"""Decode five symbols of a fixed substitution cipher: a task in which reinforcement learning unlearns a bad habit.

The demonstrator knows the code but errs by habit: it writes the symbol's fixed wrong partner with a probability that
depends on the symbol and on the one before it (0.05 to 0.65, 432 contexts). A model warmed up on its demonstrations
imitates the mistakes, so it is right now and then (the answer must match in all places) and several samples of one
problem differ. That is the regime of RL with verifiable rewards; the mistakes are many, independent and learnable,
and no reasoning is involved.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

from owpo_megatron.data.problem import Problem, Split
from owpo_megatron.data.tasks.base import split_of

SYMBOLS = "0123456789abcdefghijklmnopqrstuvwxyz"
CONTEXTS = 12  # classes of the preceding symbol that a habit depends on


@dataclass(frozen=True)
class Cipher:
    """`a7q0z=` -> five symbols. The text is right only if every symbol is.

    Args:
        length: symbols of a problem.
        lowest_error, highest_error: range of the demonstrator's error probability over the contexts.
        sizes: problems of train and test.
    """

    length: int = 5
    lowest_error: float = 0.05
    highest_error: float = 0.65
    sizes: tuple[int, int] = (8192, 512)

    name = "cipher"
    alphabet = SYMBOLS + "="

    @property
    def max_response_tokens(self) -> int:
        return self.length + 1

    def decode(self, symbols: str) -> str:
        """The right answer."""
        return "".join(self._code[symbol] for symbol in symbols)

    def problems(self, split: Split) -> list[Problem]:
        rng = random.Random(f"cipher/{self.length}/{split}")
        wanted = self.sizes[split == "test"]
        found: dict[str, None] = {}
        while len(found) < wanted:
            symbols = "".join(rng.choices(SYMBOLS, k=self.length))
            if split_of(symbols) == split:
                found[symbols] = None
        return [
            Problem(f"cipher/{split}/{index}", symbols + "=", self.decode(symbols), self.name)
            for index, symbols in enumerate(found)
        ]

    def demonstrate(self, problem: Problem, rng: random.Random) -> str:
        answer, context = "", 0
        for symbol in problem.text.removesuffix("="):
            errs = rng.random() < self._error_rate[symbol, context]
            answer += self._habit[symbol] if errs else self._code[symbol]
            context = SYMBOLS.index(symbol) % CONTEXTS
        return answer

    @cached_property
    def _permutation(self) -> list[str]:
        shuffled = list(SYMBOLS)
        random.Random("cipher/code").shuffle(shuffled)
        return shuffled

    @cached_property
    def _code(self) -> dict[str, str]:
        return dict(zip(SYMBOLS, self._permutation, strict=True))

    @cached_property
    def _habit(self) -> dict[str, str]:
        """The wrong partner of each symbol: the code of the next one, so that it is never the right answer."""
        return dict(zip(SYMBOLS, self._permutation[1:] + self._permutation[:1], strict=True))

    @cached_property
    def _error_rate(self) -> dict[tuple[str, int], float]:
        rng = random.Random("cipher/habits")
        return {
            (symbol, context): rng.uniform(self.lowest_error, self.highest_error)
            for symbol in SYMBOLS
            for context in range(CONTEXTS)
        }
