"""Reads metrics.jsonl and summary.json of a run folder. docs/metrics.md explains every field."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from owpo_megatron.errors import UserError
from owpo_megatron.run.layout import METRICS, RunFolder, step_name


@dataclass(frozen=True)
class Series:
    """A column: the steps that have it, and its value there.

    Example:
        Series(steps=[1, 2, 4], values=[0.1, 0.2, 0.4])   # step 3 lacks the field
    """

    steps: list[int]
    values: list[Any]

    def __bool__(self) -> bool:
        return bool(self.steps)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return iter(zip(self.steps, self.values, strict=True))


@dataclass(frozen=True)
class RunMetrics:
    """Everything a run wrote about itself; a field that is missing everywhere is an empty column."""

    folder: Path
    steps: list[dict[str, Any]]  # the line of each step, in order
    evals: list[dict[str, Any]]  # the line of each evaluation, in order
    summary: dict[str, Any]  # {} while the run goes on
    config: dict[str, Any]  # the resolved configuration

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A field of the configuration, `default` where it is missing or unset."""
        value: Any = self.config
        for name in dotted.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return default if value is None else value

    @property
    def name(self) -> str:
        return self.folder.name

    def column(self, field: str) -> Series:
        """A field of the step lines; dots go into nested mappings, e.g. `seconds.rollout`."""
        return _series(self.steps, field.split("."))

    def eval_column(self, field: str) -> Series:
        """A field of the evaluations, e.g. `pass@1`."""
        return _series(self.evals, ["eval", field])

    def fields_under(self, field: str) -> list[str]:
        """Names inside a nested mapping over all steps, e.g. the phases of `seconds`, in order of appearance."""
        seen: dict[str, None] = {}
        for line in self.steps:
            value = line.get(field)
            if isinstance(value, dict):
                seen.update(dict.fromkeys(value))
        return list(seen)

    def eval_fields(self) -> list[str]:
        """The scores of the evaluations (`pass@1`, `pass@8`, ...), smallest k first, then `cot_pass@1`, ..."""
        names = {name for line in self.evals for name in line["eval"] if "pass@" in name}
        return sorted(names, key=lambda name: (len(name), name))

    def eval_intervals(self, field: str) -> dict[int, tuple[float, float]]:
        """95 % intervals of a score by step, from the evaluations' own files; steps without one are left out."""
        found = {}
        for line in self.evals:
            file = RunFolder(self.folder).evaluations / f"{step_name(line['step'])}.json"
            metrics = _mapping(file).get("metrics", {})
            if field in metrics and "low" in metrics[field]:
                found[int(line["step"])] = (metrics[field]["low"], metrics[field]["high"])
        return found

    def swaps(self) -> list[int]:
        """Steps after which the reference was replaced by the policy."""
        timed = {step for step, _ in self.column("seconds.swap")}
        noted = {source for source in self.column("ref_step").values if source}
        return sorted(timed | noted)


def read_run(folder: Path | str) -> RunMetrics:
    """Read a run folder. A half-written last line is left out, and JSON that is no line of a step; of a step written
    twice the later line counts.

    Raises:
        UserError: there is no metrics.jsonl, or a line of it is not JSON.
    """
    folder = Path(folder)
    places = RunFolder(folder)
    file = places.metrics
    if not file.is_file():
        raise UserError("run folder", folder, f"has no {METRICS}; give a folder under runs/ of a run that has started")
    steps: dict[int, dict[str, Any]] = {}
    evals: dict[int, dict[str, Any]] = {}
    for line in _lines(file):
        kind = evals if isinstance(line.get("eval"), dict) else steps
        kind[int(line["step"])] = line
    summary, config = _mapping(places.summary), _mapping(places.config)
    return RunMetrics(folder, _in_order(steps), _in_order(evals), summary, config)


def last_mean(series: Series, last: int = 10) -> float | None:
    """Mean over the last values, None of an empty column."""
    tail = series.values[-last:]
    return sum(tail) / len(tail) if tail else None


def smoothed(values: Sequence[float], weight: float = 0.7) -> list[float]:
    """Exponential moving average, corrected for its start, so that the first value is itself."""
    out, average, total = [], 0.0, 0.0
    for value in values:
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        out.append(average / total)
    return out


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    texts = file.read_text(errors="replace").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError as error:
            if number == len(texts):  # the line that a running or killed trainer was writing
                return
            raise UserError(f"{file}:{number}", text[:60], "is not JSON; remove the line") from error
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def _mapping(file: Path) -> dict[str, Any]:
    """A JSON or YAML file, {} when there is none; YAML reads both."""
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(str(file), "(unreadable)", "remove the file; the report can do without it") from error
    return content if isinstance(content, dict) else {}


def _series(lines: Iterable[dict[str, Any]], path: list[str]) -> Series:
    steps, values = [], []
    for line in lines:
        value: Any = line
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            steps.append(int(line["step"]))
            values.append(value)
    return Series(steps, values)


def _in_order(lines: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    return [lines[step] for step in sorted(lines)]
