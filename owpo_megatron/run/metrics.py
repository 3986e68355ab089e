"""metrics.jsonl: one line per step, the source for reports and tests. docs/metrics.md explains every field."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from owpo_megatron.errors import RunError
from owpo_megatron.run.files import write_whole
from owpo_megatron.run.layout import SUMMARY, RunFolder
from owpo_megatron.run.speed import Speed
from owpo_megatron.types import Sink

# sum of an update -> (field of the line, what it is divided by)
_MEANS = {
    "loss_sum": ("loss", "loss_count"),
    "ratio_sum": ("ratio_mean", "tokens"),
    "kl_old_sum": ("kl_old", "tokens"),
    "clip_count": ("clip_fraction", "tokens"),
    "entropy_sum": ("entropy", "tokens"),
    "mismatch_sum": ("mismatch", "tokens"),
    "tis_sum": ("tis_mean", "tokens"),
    "tis_capped": ("tis_capped", "tokens"),
    "w_sum": ("w_mean", "tokens"),
    "w_at_low": ("w_at_low", "active_tokens"),
    "w_at_high": ("w_at_high", "active_tokens"),
    "kl_ref_sum": ("kl_ref", "ref_tokens"),
    "abs_delta_sum": ("abs_delta", "ref_tokens"),
    "case_1": ("case_1", "ref_tokens"),
    "case_2": ("case_2", "ref_tokens"),
    "case_3": ("case_3", "ref_tokens"),
    "case_4": ("case_4", "ref_tokens"),
    "reversed_count": ("reversed_fraction", "ref_tokens"),
    "turned_count": ("turned_by_beta", "ref_tokens"),
}
_COUNTS = ("tokens", "active_tokens", "delta_hist")
# sums that are divisors, or that no line has; every further one is a method's own metric
_KNOWN = {*_MEANS, *_COUNTS, "loss_count", "ref_tokens", "abs_log_ratio_sum", "head_rows", "head_gradient_rows"}


class StepLine:
    """Collects one step; `as_dict` is the line. Implements StepLog.

    Means are over all tokens of the step's updates; `grad_norm` is their mean and `lr` the last. A mean over no tokens
    is left out.
    """

    def __init__(self, step: int):
        self._values: dict[str, Any] = {"step": step + 1}
        self._seconds: dict[str, float] = {}
        self._sums: dict[str, Any] = {}
        self._skipped = 0
        self._grad_norms: list[float] = []
        self._started = time.perf_counter()
        self.on_phase: Callable[[str], AbstractContextManager[None]] = lambda phase: contextlib.nullcontext()
        """A block around each phase."""

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        with self.on_phase(phase):
            yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started

    def __contains__(self, field: str) -> bool:
        return field in self._values

    def add(self, **values: Any) -> None:
        self._values.update(values)

    def add_update(self, sums: dict[str, Any]) -> None:
        """One update's sums (policy.update); one that left the weights as they were counts as none."""
        sums = dict(sums)
        grad_norm, skipped = sums.pop("grad_norm"), sums.pop("skipped", 0)
        self._values["lr"] = sums.pop("lr")
        self._skipped += skipped
        if not skipped and sums.get("loss_count", 1):
            self._grad_norms.append(grad_norm)
        for name, value in sums.items():
            known = self._sums.get(name)
            if known is None:
                self._sums[name] = value
            elif isinstance(value, list):
                self._sums[name] = [old + new for old, new in zip(known, value, strict=True)]
            else:
                self._sums[name] = known + value

    def as_dict(self) -> dict[str, Any]:
        line = dict(self._values)
        line["updates"] = len(self._grad_norms)
        if self._skipped:
            line["updates_skipped"] = self._skipped
        if self._grad_norms:
            line["grad_norm"] = sum(self._grad_norms) / len(self._grad_norms)
        for name, (field, divisor) in _MEANS.items():
            if self._sums.get(divisor):
                line[field] = _divided(self._sums[name], self._sums[divisor]) if name in self._sums else None
        for name in _COUNTS:
            if name in self._sums:
                line[name] = self._sums[name]
        for name in sorted(self._sums.keys() - _KNOWN) if self._sums.get("tokens") else ():
            line[name.removesuffix("_sum")] = _divided(self._sums[name], self._sums["tokens"])
        self._seconds["total"] = time.perf_counter() - self._started
        line["seconds"] = {phase: round(seconds, 4) for phase, seconds in self._seconds.items()}
        return {name: value for name, value in line.items() if value is not None}


def _numbers(value: Any) -> Any:
    """The value with null for numbers that JSON does not have: NaN and the infinities."""
    if isinstance(value, dict):
        return {name: _numbers(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _divided(total: float | list[float], count: float) -> float | list[float]:
    return [value / count for value in total] if isinstance(total, list) else total / count


def lines_in(file: Path) -> list[dict[str, Any]]:
    """The lines of steps and evaluations in this file; what is no line is left out."""
    texts = file.read_text(errors="replace").splitlines() if file.exists() else []
    return [line for line in map(_line_in, texts) if line is not None]


def _line_in(text: str) -> dict[str, Any] | None:
    """The line of a step or of an evaluation; None for what a killed run was writing, or a broken disk returns."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


class MetricsFile:
    """Appends lines, each flushed to the disk; drops the lines of steps that are trained again after a resume.

    A run folder that is moved or removed while the run writes into it ends the run: half of it would be elsewhere.

    Args:
        sinks: receive each line once it is on the disk.
        speed: adds tokens per second and MFU to each step's line; None: neither.
        judge: more fields of a step's line, made from the line.
    """

    def __init__(
        self,
        path: Path,
        sinks: Sequence[Sink] = (),
        speed: Speed | None = None,
        judge: Callable[[dict[str, Any]], dict[str, Any]] = lambda line: {},
    ):
        self._path = path
        self._judge = judge
        self._speed = speed
        self._sinks = sinks
        self._open: StepLine | None = None
        self._notes: dict[str, Any] = {}
        self._began = False
        path.parent.mkdir(parents=True, exist_ok=True)

    def under_way(self) -> dict[str, Any] | None:
        """Return the incomplete line of the current step, to be saved in a checkpoint; see `drop_after`."""
        return self._open.as_dict() if self._open else None

    def drop_after(self, step: int, line: dict[str, Any] | None = None) -> list[int]:
        """Keep the lines of steps up to `step` (and what is no line never: a half-written one, garbage).

        A summary of the run goes: it is not finished any more, or will write it again.

        Args:
            line: `under_way` of the checkpoint of that step; written where the run was killed before it was.

        Returns:
            Steps up to `step` whose lines are lost.
        """
        kept, there = [], set()
        for text in self._path.read_text(errors="replace").splitlines() if self._path.exists() else []:
            known = _line_in(text)
            if known is not None and known["step"] <= step:
                kept.append(text)
                there |= set() if "eval" in known else {known["step"]}
        if line is not None and step not in there:
            kept.append(json.dumps(line))
            there.add(step)
        write_whole(self._path, "".join(text + "\n" for text in kept), durable=True)
        self._path.with_name(SUMMARY).unlink(missing_ok=True)
        return [one for one in range(1, step + 1) if one not in there]

    def note(self, **values: Any) -> None:
        """Fields of the next step's line, for what happened before it."""
        self._notes |= values

    def evaluation(self, step: int) -> dict[str, Any] | None:
        """Return the scores of this step's evaluation, if the file has them."""
        found = [line for line in lines_in(self._path) if line["step"] == step and "eval" in line]
        return found[0]["eval"] if found else None

    def append(self, line: dict[str, Any]) -> None:
        """Add a line.

        Raises:
            RunError: the run folder is not where it was.
        """
        folder = self._path.parent
        marks = (self._path, RunFolder(folder).config, RunFolder(folder).lock)
        if self._began and not any(mark.exists() for mark in marks):
            raise RunError(
                f"the run folder {folder} was moved or removed while the run wrote into it; put it back there and "
                "start the same command again: it goes on from its last checkpoint"
            )
        self._began = True
        with self._path.open("a") as file:
            file.write(json.dumps(_numbers(line)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for sink in self._sinks:
            if "eval" in line:
                sink.evaluation(line["step"], line["eval"])
            else:
                sink.step(line)

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[StepLine]:
        """A line that is written when the step ends without an error."""
        self._open = line = StepLine(step)
        line.add(**self._notes)
        yield line
        self._notes = {}
        self._open = None
        found = line.as_dict()
        self.append(found | self._judge(found) | ({"speed": self._speed.of(found)} if self._speed else {}))


@contextlib.contextmanager
def silent_step(step: int) -> Iterator[StepLine]:
    """The same on the ranks that write no file."""
    yield StepLine(step)
