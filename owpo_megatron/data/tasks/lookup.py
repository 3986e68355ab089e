"""Look two keys up in a random table and add the entries: a task that cannot be solved without a tool.

Every problem has a table of its own, so that nothing of it can be learnt by heart: without the tool the best guess is
right once in nine. The demonstrator mostly guesses. Now and then it asks for a key, and seldom for the other one too;
so a model warmed up on it knows how the tool is used and how two digits are added, and has to learn that it pays.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from owpo_megatron.data.problem import Problem, Split
from owpo_megatron.data.tasks.base import split_of

KEYS = "abcdefghijklmnopqrstuvwxyz"
ASK, NOTHING = "?", "-"  # behind a key; the entry of what is no key


def table_of(problem: str) -> dict[str, int]:
    """The table of the problem with this id: a digit from 1 to 9 for every key."""
    rng = random.Random(f"lookup/table/{problem}")
    return {key: rng.randrange(1, 10) for key in KEYS}


@dataclass(frozen=True)
class Lookup:
    """`k+w=` -> the sum of the two entries, e.g. by the turns `k?`, `w?` and `13`.

    Args:
        asks, asks_again: probabilities of the demonstrator's first look, and of its second. With both it adds rightly;
            with one it answers with that entry, which is never right.
        sizes: problems of train and test.
    """

    asks: float = 0.25
    asks_again: float = 0.2
    sizes: tuple[int, int] = (4096, 256)

    name = "lookup"
    alphabet = KEYS + "0123456789+=" + ASK + NOTHING

    @property
    def max_response_tokens(self) -> int:
        return 2 * (len("k?") + 1 + len("9")) + len("18") + 1

    def problems(self, split: Split) -> list[Problem]:
        rng = random.Random(f"lookup/{split}")
        found: list[Problem] = []
        while len(found) < self.sizes[split == "test"]:
            name, (first, second) = f"lookup/{split}/{len(found)}", rng.sample(KEYS, 2)
            if split_of("".join(sorted((first, second)))) == split:
                table = table_of(name)
                found.append(Problem(name, f"{first}+{second}=", str(table[first] + table[second]), self.name))
        return found

    def demonstrate(self, problem: Problem, rng: random.Random) -> list[str]:
        """Replies, and between them what the environment answers."""
        table, first, second = table_of(problem.id), problem.text[0], problem.text[2]
        if rng.random() >= self.asks:
            return [str(rng.randrange(20))]
        turns = [first + ASK, str(table[first])]
        if rng.random() >= self.asks_again:
            return [*turns, str(table[first])]
        return [*turns, second + ASK, str(table[second]), str(table[first] + table[second])]
