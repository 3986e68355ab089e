"""The whole report on a set: its own faults, and the evaluation problems in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from owpo_megatron.data.contamination import SetContamination, held_in
from owpo_megatron.data.faults import Faults, find_faults
from owpo_megatron.data.problem import Problem
from owpo_megatron.data.sources import read_problems
from owpo_megatron.errors import UserError
from owpo_megatron.types import Progress


@dataclass(frozen=True)
class DataReport:
    source: str
    overlap: float  # least share of an evaluation problem's word sequences that counts
    faults: Faults
    against: tuple[SetContamination, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_data(
    source: str,
    against: Mapping[str, Sequence[Problem]],
    overlap: float,
    progress: Progress | None = None,
    rule: str = "auto",
    columns: Mapping[str, str] | None = None,
) -> DataReport:
    """Read a source whole and look for every fault.

    Args:
        against: evaluation sets by the name to show.
        rule: verifier rule that has to read the answers.
        columns: see `data.columns`.
        progress: called after the set itself and after each evaluation set.

    Raises:
        UserError: the source cannot be read, or holds nothing.
    """
    problems = list(read_problems(source, columns=columns))
    if not problems:
        raise UserError("data.source", source, "holds no records")
    steps = len(against) + 1
    faults = find_faults(problems, rule)
    sets = []
    for done, (name, evaluation) in enumerate(against.items(), start=1):
        if progress:
            progress(done, steps)
        sets.append(held_in(name, evaluation, problems, overlap))
    if progress:
        progress(steps, steps)
    return DataReport(source, overlap, faults, tuple(sets))
