"""Coverage gained and lost: problems that a model solves and its base does not, and the reverse; entropy of answers.

Reinforcement learning can raise Pass@1 and lose problems that the base solves now and then: Pass@k at a large k, and
the sets of solved problems, show it; so does the entropy of the answers, which falls where samples agree more.

Sources: The Invisible Leash (arXiv:2507.14843): support preserved, lost and found; Limit of RLVR (arXiv:2504.13837).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from owpo_megatron.errors import UserError


@dataclass(frozen=True)
class Coverage:
    """Problems of one set that base and model solve with at least one of their samples.

    `gained` and `lost` hold the ids.
    """

    problems: int
    base_samples: int
    model_samples: int
    both: int
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    neither: int
    base_entropy: float | None  # nats, mean over problems; None: no responses were kept
    model_entropy: float | None

    @property
    def retained(self) -> float:
        """Share of the base's solved problems that the model solves too; 1 where the base solves none."""
        return self.both / max(self.both + len(self.lost), 1) if self.both or self.lost else 1.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"retained": self.retained}


def coverage(base: Sequence[Mapping[str, Any]], model: Sequence[Mapping[str, Any]]) -> Coverage:
    """Compare two evaluations of one set.

    Args:
        base, model: a line per problem, as evaluations write them (id, correct, verdicts, responses).

    Raises:
        UserError: they are of other problems, or of other numbers of samples.
    """
    ours = {str(line["id"]): line for line in model}
    theirs = {str(line["id"]): line for line in base}
    if ours.keys() != theirs.keys():
        other = next(iter(ours.keys() ^ theirs.keys()))
        raise UserError("evaluation", other, "only one of the two has this problem; compare evaluations of one set")
    solved = {name: (theirs[name]["correct"] > 0, ours[name]["correct"] > 0) for name in theirs}
    samples = [{len(line["verdicts"]) for line in lines.values()} for lines in (theirs, ours)]
    if samples[0] != samples[1] or len(samples[0]) != 1:
        remedy = "both need the same number of samples per problem: more samples cover more problems by themselves"
        raise UserError("evaluation", f"{sorted(samples[0])} and {sorted(samples[1])} samples", remedy)
    return Coverage(
        problems=len(solved),
        base_samples=next(iter(samples[0])),
        model_samples=next(iter(samples[1])),
        both=sum(pair == (True, True) for pair in solved.values()),
        gained=tuple(name for name, pair in solved.items() if pair == (False, True)),
        lost=tuple(name for name, pair in solved.items() if pair == (True, False)),
        neither=sum(pair == (False, False) for pair in solved.values()),
        base_entropy=_mean_entropy(base),
        model_entropy=_mean_entropy(model),
    )


def answer_entropy(answers: Sequence[Hashable]) -> float:
    """Entropy in nats of the distribution of one problem's answers.

    Example:
        >>> round(answer_entropy(["4", "4", "5", "6"]), 4)  # ln 2 + (ln 2) / 2
        1.0397
    """
    total = len(answers)
    return -sum(count / total * math.log(count / total) for count in Counter(answers).values())


def read_problems(file: Path) -> list[dict[str, Any]]:
    """Read an evaluation's problems (NAME.jsonl).

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    try:
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError("evaluation", file, "name the NAME.jsonl of an evaluation") from error
    if not lines or any(not {"id", "correct", "verdicts"} <= line.keys() for line in lines):
        raise UserError(
            "evaluation", file, "name the NAME.jsonl of an evaluation: a line per problem with its verdicts"
        )
    return lines


def _mean_entropy(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean entropy of the answers where they are known (`answers`), else of the whole responses."""
    told = [line.get("answers") or [tuple(one) for one in line.get("responses", ())] for line in lines]
    return sum(map(answer_entropy, told)) / len(told) if all(told) else None
