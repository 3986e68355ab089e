"""Evaluation problems in the training data: shared word sequences (n-grams), as for GPT-3's sets.

An evaluation problem is contaminated by a training problem that holds at least a share `overlap` of its sequences of
`SEQUENCE` words. Ten words are few enough for short problems and many enough that AIME 2024, which is not in
DAPO-Math-17k, shares at most a third with any problem there, while the AMC problems that are in it share 0.8 to 1.

Source: Brown et al. 2020 (arXiv:2005.14165), appendix C, with sequences counted by problem instead of by document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from owpo_megatron.data.problem import Problem, letters_and_digits, words

SEQUENCE = 10  # words; a shorter problem is one sequence
_LEAST_WORDS = 5  # problems of fewer words ("What is 2 + 2?") are everywhere and prove nothing


@dataclass(frozen=True)
class Match:
    """A training problem that holds an evaluation problem, wholly or for the most part.

    Example:
        Match(eval_id="amc2023-12A-12", train_id="dapo-15860", share=1.0, kind="same")
    """

    eval_id: str
    train_id: str
    share: float  # of the evaluation problem's sequences that the training problem holds, 0 .. 1
    kind: Literal[
        "same", "inside", "similar"
    ]  # the same letters and digits; all of them in a row, among others; neither


class Contamination:
    """An index of evaluation problems, to which training problems are held one by one.

    Args:
        problems: of one or more evaluation sets.
        overlap: the least share that counts.
    """

    def __init__(self, problems: Iterable[Problem], overlap: float):
        self._overlap = overlap
        self._problems = [problem for problem in problems if len(words(problem.text)) >= _LEAST_WORDS]
        self._keys = [letters_and_digits(problem.text) for problem in self._problems]
        self._sizes: list[int] = []
        self._holders: dict[int, list[int]] = {}  # sequence -> evaluation problems that have it
        for index, problem in enumerate(self._problems):
            sequences = _sequences(words(problem.text), SEQUENCE)
            self._sizes.append(len(sequences))
            for sequence in sequences:
                self._holders.setdefault(sequence, []).append(index)
        # a problem shorter than SEQUENCE is one sequence of its own length, looked up in that length
        self._lengths = sorted({min(SEQUENCE, len(words(problem.text))) for problem in self._problems})

    def matches(self, problem: Problem) -> Iterator[Match]:
        """Return the evaluation problems inside this training problem, in their order."""
        text = words(problem.text)
        shared: Counter[int] = Counter()
        for length in self._lengths:
            if length <= len(text):
                for sequence in _sequences(text, length):
                    shared.update(self._holders.get(sequence, ()))
        key = ""
        for index, count in sorted(shared.items()):
            share = count / self._sizes[index]
            if share >= self._overlap:
                key = key or letters_and_digits(problem.text)
                yield Match(self._problems[index].id, problem.id, round(share, 4), _kind(self._keys[index], key))


@dataclass(frozen=True)
class SetContamination:
    """One evaluation set against the training problems."""

    source: str
    problems: int
    same: int  # evaluation problems that are a training problem
    inside: int  # contained word for word in one; those above are not counted again
    similar: int  # that share at least `overlap` with one; those above are not counted again
    matches: tuple[Match, ...]


def held_in(source: str, evaluation: Sequence[Problem], train: Iterable[Problem], overlap: float) -> SetContamination:
    """Every match of an evaluation set, its best training problem first."""
    index = Contamination(evaluation, overlap)
    found = [match for problem in train for match in index.matches(problem)]
    kinds = ("same", "inside", "similar")
    found.sort(key=lambda match: (match.eval_id, kinds.index(match.kind), -match.share, match.train_id))
    best = {match.eval_id: match.kind for match in reversed(found)}
    count = Counter(best.values())
    return SetContamination(
        source, len(evaluation), count["same"], count["inside"], count["similar"], matches=tuple(found)
    )


def _kind(evaluation: str, train: str) -> Literal["same", "inside", "similar"]:
    return "same" if evaluation == train else "inside" if evaluation in train else "similar"


def _sequences(text: list[str], length: int) -> set[int]:
    length = min(length, len(text))
    return {hash(tuple(text[start : start + length])) for start in range(len(text) - length + 1)}
