"""Find faults in a set of problems (repeats, contradictions, doubtful answers), and leave such problems out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from owpo_megatron.config import Config
from owpo_megatron.data.contamination import Contamination
from owpo_megatron.data.files import short
from owpo_megatron.data.problem import Problem, answer_key, is_chinese, letters_and_digits, without_spaces
from owpo_megatron.types import Prompt
from owpo_megatron.verifiers.golds import unreadable
from owpo_megatron.verifiers.rules import rule_of_domain

LONG_ANSWER = 15  # digits: float64 counts exactly up to here, so longer integers may be rounded ones
_INTEGER = re.compile(r"[-+]?\d+")


@dataclass(frozen=True)
class Conflict:
    """The same problem with several answers, at most one of which is right."""

    ids: tuple[str, ...]
    answers: tuple[str, ...]  # of these, in the same order


@dataclass(frozen=True)
class Folded:
    """A set with one problem for each (text, answer)."""

    problems: tuple[Problem, ...]  # the first of each, in the source's order
    read: int
    repeated: int  # the same text, but for white space, with the same answer came before


def fold(problems: Iterable[Problem]) -> Folded:
    """Drop exact repeats while reading: a file that holds every row a hundred times costs time, not memory."""
    kept: list[Problem] = []
    seen: set[bytes] = set()
    read = 0
    for problem in problems:
        read += 1
        key = f"{without_spaces(problem.text)}\0{answer_key(problem.answer)}".encode()
        digest = hashlib.blake2b(key, digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(problem)
    return Folded(tuple(kept), read, read - len(kept))


def conflicts(problems: Iterable[Problem], reading: Callable[[str], str]) -> list[Conflict]:
    """Problems whose texts are the same under this reading (data/problem.py) but whose answers differ."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(reading(problem.text), []).append(problem)
    return [
        Conflict(tuple(problem.id for problem in group), tuple(problem.answer for problem in group))
        for group in groups.values()
        if len({answer_key(problem.answer) for problem in group}) > 1
    ]


def has_long_answer(problem: Problem) -> bool:
    answer = problem.answer.strip()
    return _INTEGER.fullmatch(answer) is not None and len(answer.lstrip("+-")) > LONG_ANSWER


@dataclass(frozen=True)
class Faults:
    """All that is wrong with a set by itself. Counts of rows, unless noted."""

    rows: int
    repeated: int
    texts: int  # different ones, white space apart
    problems: int  # different ones in letters and digits
    contradictory: tuple[Conflict, ...]  # the same text
    lookalike: tuple[Conflict, ...]  # the same letters and digits, those that are contradictory included
    long_answers: tuple[tuple[str, str], ...]  # (id, answer)
    integers: int  # answers that are integers
    chinese: int
    same_id: int  # rows whose id an earlier one has; a run adds `#2` to theirs
    unreadable: tuple[tuple[str, str, str], ...]  # (id, why, answer) of answers that no response can equal


def find_faults(problems: Collection[Problem], rule: str = "auto") -> Faults:
    """Look at a whole set, repeats included.

    Args:
        rule: verifier rule that has to read the answers.
    """
    return Faults(
        rows=len(problems),
        repeated=fold(problems).repeated,
        texts=len({without_spaces(problem.text) for problem in problems}),
        problems=len({letters_and_digits(problem.text) for problem in problems}),
        contradictory=tuple(conflicts(problems, without_spaces)),
        lookalike=tuple(conflicts(problems, letters_and_digits)),
        long_answers=tuple((problem.id, problem.answer) for problem in problems if has_long_answer(problem)),
        integers=sum(_INTEGER.fullmatch(problem.answer.strip()) is not None for problem in problems),
        chinese=sum(is_chinese(problem.text) for problem in problems),
        same_id=len(problems) - len({problem.id for problem in problems}),
        unreadable=tuple(unreadable_golds(problems, rule)),
    )


def unreadable_golds(problems: Iterable[Problem | Prompt], rule: str) -> Iterator[tuple[str, str, str]]:
    """(id, why, answer) of every gold answer that no response can equal under a rule of the verifier."""
    for problem in problems:
        why = unreadable(problem.answer, rule_of_domain(problem.domain) if rule == "auto" else rule)
        if why:
            yield problem.id, why, problem.answer


def with_unique_ids(problems: Iterable[Problem]) -> tuple[list[Problem], int]:
    """(the problems, a second one of an id called ID#2, how many that were): an id finds one problem."""
    taken: dict[str, int] = {}
    out: list[Problem] = []
    renamed = 0
    for problem in problems:
        count = taken[problem.id] = taken.get(problem.id, 0) + 1
        renamed += count > 1
        out.append(problem if count == 1 else replace(problem, id=f"{problem.id}#{count}"))
    return out, renamed


def leave_out(
    problems: tuple[Problem, ...], kinds: Collection[str], contamination: Contamination | None = None
) -> tuple[list[Problem], dict[str, list[str]]]:
    """(the problems without those of these kinds, the ids of what was left out by kind).

    Args:
        kinds: of `data.leave_out`; a problem counts for the first kind that it is of. `repeated` is not looked at:
            that is `fold`.
        contamination: an index of the evaluation sets, for `contaminated`.
    """
    out: dict[str, list[str]] = {}
    for kind, is_faulty in _finders(contamination).items():
        if kind not in kinds:
            continue
        faulty = is_faulty(problems)
        out[kind] = [problem.id for problem, bad in zip(problems, faulty, strict=True) if bad]
        problems = tuple(problem for problem, bad in zip(problems, faulty, strict=True) if not bad)
    return list(problems), out


Finder = Callable[[tuple[Problem, ...]], list[bool]]


def _finders(contamination: Contamination | None) -> dict[str, Finder]:
    def with_conflicts(reading: Callable[[str], str]) -> Finder:
        def find(problems: tuple[Problem, ...]) -> list[bool]:
            answers: dict[str, set[str]] = {}
            keys = [reading(problem.text) for problem in problems]
            for key, problem in zip(keys, problems, strict=True):
                answers.setdefault(key, set()).add(answer_key(problem.answer))
            return [len(answers[key]) > 1 for key in keys]

        return find

    def contaminated(problems: tuple[Problem, ...]) -> list[bool]:
        assert contamination is not None, "`contaminated` needs evaluation sets"
        return [next(contamination.matches(problem), None) is not None for problem in problems]

    return {
        "contradictory": with_conflicts(without_spaces),
        "lookalike": with_conflicts(letters_and_digits),
        "long_answer": lambda problems: [has_long_answer(problem) for problem in problems],
        "contaminated": contaminated,
    }


def notes_on(prompts: Sequence[Prompt], config: Config) -> list[str]:
    """Return notes on the training prompts to print before the first step, one line each."""
    notes = []
    unreadable_ones = list(unreadable_golds(prompts, config.verifier.rule))
    if unreadable_ones:
        name, why, answer = unreadable_ones[0]
        shown = short(" ".join(answer.split()))
        notes.append(
            f"warning: {len(unreadable_ones)} of {len(prompts)} answers in the data cannot be equalled by any response "
            f"({why}), e.g. of problem {name}: {shown}; see `owpo data check`"
        )
    wanted = config.rollout.prompts_per_step
    if len(prompts) < wanted:
        notes.append(
            f"warning: rollout.prompts_per_step = {wanted} is more than the {len(prompts)} problems: a step holds the "
            "same problem several times"
        )
    return notes
