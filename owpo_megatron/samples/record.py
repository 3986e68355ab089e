"""samples/step_N.jsonl: a row per rollout with its verdict and reward, and for a few prompts the tokens' log-probs.

Row n belongs to line n of rollouts/step_N.jsonl, which has the prompt and the token ids. Together they are all that
`owpo samples` and the report's sample browser show.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owpo_megatron.errors import UserError
from owpo_megatron.run.files import write_whole
from owpo_megatron.run.layout import step_name
from owpo_megatron.types import Group, Sample

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SampleRow:
    """One rollout of a step, as graded and as trained on.

    Example:
        SampleRow("cipher/17", 1234, correct=False, reason="wrong", reward=0.0, kept=True, advantage=-0.4, active=True)
    """

    prompt_id: str
    seed: int
    correct: bool
    reason: str  # of the verdict; with what a rule raised, where it crashed
    reward: float  # the verdict, or turned around by verifier.flip; before any overlong penalty
    kept: bool  # trained on: its group was not dropped
    advantage: float | None = None  # None: not trained on
    active: bool = False  # takes part in the reweighting
    masked: bool = False  # out of the loss
    old_logp: list[float] | None = None  # [L] policy at the step's start; None: not recorded
    ref_logp: list[float] | None = None  # [L] reference; None: not recorded or not needed
    ref_is_old: bool = False  # the reference is the policy: every ratio is 1


class SampleRecorder:
    """Writes the rows of every step. On global rank 0.

    Args:
        folder: the run's samples/.
        token_prompts: prompts per step whose token values are kept; 0: none.
    """

    def __init__(self, folder: Path, token_prompts: int):
        self._folder = folder
        self._token_prompts = token_prompts
        self._rows: list[SampleRow] = []

    def graded(self, step: int, groups: Sequence[Group], kept: Sequence[Group]) -> None:
        """Write the verdicts of a step's rollouts, in the order in which they are saved.

        Args:
            step: steps done before this one.
            groups: all that were generated.
            kept: those of them that are trained on.
        """
        inside = {id(group) for group in kept}
        self._rows = [
            SampleRow(
                rollout.prompt.id,
                rollout.seed,
                verdict.correct,
                f"{verdict.reason}: {verdict.detail}" if verdict.detail else verdict.reason,
                float(reward),
                id(group) in inside,
            )
            for group in groups
            for rollout, verdict, reward in zip(group.rollouts, group.verdicts, group.rewards, strict=True)
        ]
        self._write(step)

    def trained(self, step: int, groups: Sequence[Group], samples: Sequence[Sample]) -> None:
        """Add what the method made of the kept groups: `samples` are theirs, in the same order."""
        keys = [(rollout.prompt.id, rollout.seed) for group in groups for rollout in group.rollouts]
        group_of = [index for index, group in enumerate(groups) for _ in group.rollouts]
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for key, group, sample in zip(keys, group_of, samples, strict=True):
            values: dict[str, Any] = {
                "advantage": _scalar(sample.advantage), "active": sample.active, "masked": sample.masked
            }  # fmt: skip
            if group < self._token_prompts:
                values |= {"old_logp": _rounded(sample.old_logp), "ref_logp": _rounded(sample.ref_logp)}
                values["ref_is_old"] = sample.ref_is_old
            found[key] = values
        self._rows = [SampleRow(**(asdict(row) | found.get((row.prompt_id, row.seed), {}))) for row in self._rows]
        self._write(step)

    def _write(self, step: int) -> None:
        known = ({name: value for name, value in vars(row).items() if value is not None} for row in self._rows)
        write_whole(rows_path(self._folder, step + 1), "".join(json.dumps(one) + "\n" for one in known))


def rows_path(folder: Path, step: int) -> Path:
    return folder / f"{step_name(step)}.jsonl"


def read_rows(folder: Path, step: int) -> list[SampleRow]:
    """The rows of a step; [] where none were recorded.

    Raises:
        UserError: a line is not a row.
    """
    path = rows_path(folder, step)
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            rows.append(SampleRow(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}:{number}", line[:60], f"not a recorded sample ({error})") from error
    return rows


def _scalar(advantage: float | torch.Tensor) -> float:
    """A response's advantage; the mean over its tokens where a method gives one to each."""
    return round(float(advantage if isinstance(advantage, (int, float)) else advantage.mean()), 6)


def _rounded(logp: torch.Tensor | None) -> list[float] | None:
    return None if logp is None else [round(value, 5) for value in logp.tolist()]
