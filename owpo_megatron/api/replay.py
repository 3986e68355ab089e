"""Compute a step of a run again, from its saved rollouts, and compare with what was logged."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owpo_megatron.api.train import train
from owpo_megatron.config import Config
from owpo_megatron.errors import RunError, UserError
from owpo_megatron.run.files import locked
from owpo_megatron.run.layout import RunFolder, step_name, whole_steps
from owpo_megatron.run.metrics import lines_in

FIELDS = ("loss", "grad_norm", "weights")
ROUNDING, TINY = 1e-5, 1e-6  # relative, absolute


@dataclass(frozen=True)
class Replayed:
    """One number of a step, then and now.

    Example:
        Replayed("loss", -0.00041, -0.00041).verdict == "equal"
    """

    field: str
    logged: Any  # None: the line does not have it
    found: Any
    exact: bool = False  # the weights are the same bit for bit, so that rounding is no excuse

    @property
    def verdict(self) -> str:
        """`equal` to the last bit, `close` within rounding, `differs`, or `not logged`."""
        if self.logged is None:
            return "not logged"
        if self.logged == self.found:
            return "equal"
        numbers = isinstance(self.logged, float) and isinstance(self.found, float)
        close = numbers and not self.exact and math.isclose(self.logged, self.found, rel_tol=ROUNDING, abs_tol=TINY)
        return "close" if close else "differs"


@dataclass(frozen=True)
class Replay:
    """A step that was computed again."""

    step: int
    start: int  # step of the checkpoint that it began with; 0: the model
    fields: tuple[Replayed, ...]
    failure: str = ""  # of the step, now; "" where it ended well

    @property
    def agrees(self) -> bool:
        """Whether nothing that was logged differs, weights of another rounding aside."""
        told = {one.field: one.verdict for one in self.fields}
        rounded = "close" in told.values()
        return not self.failure and all(
            verdict != "differs" or (field == "weights" and rounded) for field, verdict in told.items()
        )


class _StopAt:
    """Stops a run after this step, and keeps its line."""

    def __init__(self, step: int):
        self._step = step
        self.line: dict[str, Any] = {}

    def on_step(self, line: dict[str, Any]) -> bool:
        if line["step"] == self._step:
            self.line = line
        return line["step"] >= self._step


def replay(run: RunFolder, step: int) -> Replay:
    """Train from the checkpoint before this step up to it, on the run's rollouts, in RUN/replay (removed afterwards).

    The rest of the run folder is only read; where it is read-only, a temporary folder takes the place of RUN/replay.

    Raises:
        UserError: no configuration, no rollouts of a step, a method that needs the run's evaluations, or another replay
            of this run.
    """
    if not run.config.is_file():
        raise UserError("run folder", run.path, "has no config.yaml; name the folder of a run")
    config = Config.load(run.config)
    if config.reference.refresh == "best_of_stage":
        remedy = "its swaps depend on evaluations, which need an engine; a replay has none"
        raise UserError("reference.refresh", config.reference.refresh, remedy)
    logged = _line(run, step)
    start = max((one for one in whole_steps(run.checkpoints) if one < step), default=0)
    rollouts = config.rollout.replay or _rollouts(run, range(start + 1, step + 1))
    with _scratch(run) as scratch:
        if start:
            name = step_name(start)
            shutil.copytree(run.checkpoints / name, scratch.checkpoints / name, copy_function=_link)
        stop, failure = _StopAt(step), ""
        try:
            train(_settings(config, scratch, rollouts), callbacks=[stop])
        except RunError as error:
            failure = str(error)
        exact = "weights" in logged and logged["weights"] == stop.line.get("weights")
        fields = tuple(Replayed(name, logged.get(name), stop.line.get(name), exact) for name in FIELDS)
        return Replay(step, start, fields, failure)


@contextmanager
def _scratch(run: RunFolder) -> Iterator[RunFolder]:
    with ExitStack() as stack:
        place = run.path
        if not os.access(place, os.W_OK):  # another user's run, or a read-only disk
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="owpo-replay-")))
        scratch = RunFolder(place / "replay")
        if scratch.lock.is_file() and stack.enter_context(locked(scratch.lock)) is None:
            remedy = "another owpo replay of this run works there; wait for it"
            raise UserError("run folder", scratch.path, remedy)
        shutil.rmtree(scratch.path, ignore_errors=True)
        stack.callback(shutil.rmtree, scratch.path, ignore_errors=True)
        yield scratch


def _line(run: RunFolder, step: int) -> dict[str, Any]:
    """The step's line; {} where the run ended in this step.

    Raises:
        UserError: the run has not come to it.
    """
    lines = {line["step"]: line for line in lines_in(run.metrics) if "seconds" in line}
    last = max(lines, default=0)
    if not 1 <= step <= last + 1:
        raise UserError("--step", step, f"the run has done {last} steps; give one of them, or the one that failed")
    return lines.get(step, {})


def _rollouts(run: RunFolder, steps: range) -> Path:
    for step in steps:
        if not (run.rollouts / f"{step_name(step)}.jsonl").is_file():
            remedy = f"step {step} has no rollouts in {run.rollouts} (rollout.save); give a step after a checkpoint"
            raise UserError("--step", steps[-1], remedy)
    return run.rollouts


def _settings(config: Config, scratch: RunFolder, rollouts: Path) -> dict[str, Any]:
    raw = config.model_dump(mode="json", exclude_unset=True)
    raw |= {"name": scratch.path.name, "runs_dir": str(scratch.path.parent), "sinks": {}, "profile": {}}
    raw["rollout"] = raw.get("rollout", {}) | {"replay": str(rollouts), "save": False}
    raw["eval"] = {"before": False, "after": False}
    raw["checkpoint"] = {"every": 0, "export_hf": False}
    return raw


def _link(source: str, target: str) -> None:
    """A second name for a file instead of a copy; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
