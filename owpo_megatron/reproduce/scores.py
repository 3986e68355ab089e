"""Scores of finished runs at their best and their last checkpoint: from the run's own evaluations, or drawn afterwards.

The validation set was evaluated by the run itself, when its checkpoints were chosen (section 5.1); the other sets are
evaluated once a run has finished, as `owpo eval --run` does it. What was drawn is not drawn again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owpo_megatron.api.evaluation_jobs import Job, Wish, prepared_jobs
from owpo_megatron.engine.shared import SharedEngine
from owpo_megatron.evaluation.targets import NEWEST
from owpo_megatron.experiments.spec import RunSpec
from owpo_megatron.reproduce.artefacts import AVERAGE, VALIDATION, Cell
from owpo_megatron.reproduce.recipe import Recipe
from owpo_megatron.reproduce.runs import Row
from owpo_megatron.run.layout import BEST, REACHED, SCORE, RunFolder, step_name

Watch = Callable[[Job], Any]
"""Called with a job before it draws; returns the `watch` of `Job.run`."""
_CHECKPOINTS = {"best": BEST, "converged": NEWEST, "reached": REACHED}


@dataclass(frozen=True)
class Wanted:
    """An evaluation after a run: its sets (by the paper's names) at some of its checkpoints.

    Example:
        Wanted(spec, ("best", "converged"), ("aime25", "amc"))
    """

    run: RunSpec
    places: tuple[str, ...]
    sets: tuple[str, ...]


def wanted_after(rows: Sequence[Row], columns: Sequence[Cell]) -> list[Wanted]:
    """Return the evaluations that a table needs beside the ones that its runs make themselves."""
    sets = tuple(dict.fromkeys(name for name, _, _ in columns if name not in (AVERAGE, VALIDATION)))
    places = tuple(dict.fromkeys(place for _, _, place in columns))
    if not sets:
        return []
    return [Wanted(run, places, sets) for row in rows for run in row.runs.values()]


class Evaluation:
    """Evaluates checkpoints; one server, started when it is first needed, serves all of them in turn.

    Args:
        root: folder of the run folders.
        wish: options of `owpo eval`; its sets are replaced.
        engines: start engines for every checkpoint as the run's configuration asks, instead of one for all.
    """

    def __init__(self, recipe: Recipe, root: Path, wish: Wish, log: Path, watch: Watch, engines: bool):
        self._recipe, self._root, self._wish, self._watch = recipe, root, wish, watch
        self._engine = None if engines else SharedEngine(log)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def __call__(self, wanted: Wanted) -> dict[tuple[str, str], dict[str, Any]]:
        """Return the scores by (set, place). Raises UserError and EngineError as `owpo eval` does."""
        sets = {self._recipe.sets[name].name: name for name in wanted.sets}
        wish = Wish(tuple(self._recipe.sets[name] for name in wanted.sets), *_options(self._wish))
        folder = wanted.run.folder(self._root)
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for place in wanted.places:
            checkpoint = checkpoint_of(wanted.run, self._root, place)
            jobs = prepared_jobs([], [folder], [checkpoint], [], wish, None)
            draws = not all(map(_is_finished, jobs))
            if draws:
                jobs = prepared_jobs([], [folder], [checkpoint], self._overrides(wanted.run), wish, None)
            for job in jobs:
                for scores in job.run(wish, self._watch(job) if draws else lambda prepared: None):
                    found[sets[str(scores["set"])], place] = scores
        return found

    def _overrides(self, run: RunSpec) -> list[str]:
        """Engines of the run's configuration, or the URL of the shared one."""
        if self._engine is None or run.config.engine.urls:
            return []
        return [f"engine.urls=['{self._engine.url(run.config)}']"]


def _is_finished(job: Job) -> bool:
    """Whether all its results are there, so that no engine is needed."""
    return all((job.target.out / f"{one.spec.name}.json").is_file() for one in job.sets)


def _options(wish: Wish) -> tuple[Any, ...]:
    return (wish.samples, wish.limit, wish.data, wish.max_tokens, wish.template, wish.seed, wish.fresh)


def score_of_run(run: RunSpec, root: Path, set_name: str, place: str) -> dict[str, Any]:
    """Return what the run itself measured on its validation set at a checkpoint: metrics with intervals, sizes."""
    folder = RunFolder(run.folder(root))
    file = folder.evaluations / f"{step_name(step_of(run, root, place))}_{set_name}.json"
    scores: dict[str, Any] = json.loads(file.read_text())
    return scores


def checkpoint_of(run: RunSpec, root: Path, place: str) -> str:
    """Return the name of a checkpoint for `owpo eval --checkpoint`: weights of one step always under one name.

    The last checkpoint and the best weights may be of the same step; results belong to one of the two folders.
    """
    if place != "converged":
        return _CHECKPOINTS[place]
    kept = [name for name in (BEST, REACHED) if (run.folder(root) / name).exists()]
    return next((name for name in kept if step_of(run, root, name) == run.config.optimizer.steps), NEWEST)


def step_of(run: RunSpec, root: Path, place: str) -> int:
    """Return the step of a checkpoint."""
    if place == "converged":
        return run.config.optimizer.steps
    link = run.folder(root) / _CHECKPOINTS[place]
    return int(json.loads((link / SCORE).read_text())["step"])


def collect(
    rows: Sequence[Row], columns: Sequence[Cell], recipe: Recipe, root: Path, evaluation: Evaluation
) -> dict[tuple[str, str, str, str], list[float]]:
    """Return the values of a table by (row, set, metric, checkpoint): one for each seed, as shares of 1."""
    values: dict[tuple[str, str, str, str], list[float]] = {}
    after = {(one.run.key): one for one in wanted_after(rows, columns)}
    for row in rows:
        for run in row.runs.values():
            drawn = evaluation(after[run.key]) if run.key in after else {}
            for name, metric, place in columns:
                if name == AVERAGE:
                    continue
                own = recipe.sets[name].name
                scores = score_of_run(run, root, own, place) if name == VALIDATION else drawn[name, place]
                values.setdefault((row.entry.label, name, metric, place), []).append(scores["metrics"][metric]["value"])
    return values
