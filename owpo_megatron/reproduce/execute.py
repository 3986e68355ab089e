"""Make a table or figure: the missing runs, the missing evaluations, then the files of the layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from owpo_megatron.api.evaluation_jobs import Wish
from owpo_megatron.experiments.pool import Failure, OnEvent, run_all, with_needs
from owpo_megatron.experiments.spec import RunSpec
from owpo_megatron.methods.metrics import BETAS
from owpo_megatron.report.reversals import reversal_table
from owpo_megatron.report.scores import ScoreTable
from owpo_megatron.reproduce.artefacts import AVERAGE, VALIDATION, Artefact
from owpo_megatron.reproduce.recipe import Recipe
from owpo_megatron.reproduce.runs import Row, check_changes, dapo_of, rows_of
from owpo_megatron.reproduce.scores import Evaluation, Wanted, Watch, collect, score_of_run
from owpo_megatron.run.files import write_whole
from owpo_megatron.run.metrics_reader import read_run


@dataclass(frozen=True)
class Reproduction:
    """A table or figure with its runs.

    Args:
        root: folder of the run folders, shared by all tables and figures of this model.

    Raises:
        UserError: the recipe changes a field that would reach none of the runs.
    """

    artefact: Artefact
    recipe: Recipe
    seeds: list[int]
    root: Path
    rows: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        check_changes(self.artefact, self.recipe)
        object.__setattr__(self, "rows", rows_of(self.artefact, self.recipe, self.seeds))

    @property
    def runs(self) -> list[RunSpec]:
        """Every run, each after those that it needs."""
        return with_needs([run for row in self.rows for run in row.runs.values()])

    @property
    def missing(self) -> list[RunSpec]:
        return [run for run in self.runs if not run.is_done(self.root)]

    def train(self, workers: int | None, on_event: OnEvent) -> list[Failure]:
        """Make the missing runs on this machine; Ctrl-C loses no finished step, the next call goes on."""
        return run_all(self.runs, self.root, workers, on_event)

    def evaluate(self, wish: Wish, watch: Watch, engines: bool) -> dict[str, Any]:
        """Evaluate what is missing and return everything that the layout shows; all runs must have finished."""
        made = Evaluation(self.recipe, self.root, wish, self.root.parent / "logs" / "engine.log", watch, engines)
        with closing(made):
            values = collect(self.rows, self.artefact.columns, self.recipe, self.root, made)
            reference = self._reference(made)
        return {
            "name": self.artefact.name,
            "title": self.artefact.title,
            "kind": self.artefact.kind,
            "scale": self.recipe.scale,
            "model": self.recipe.run.model.path.name,
            "seeds": self.seeds,
            "rows": [row.entry.label for row in self.rows],
            "columns": [list(cell) for cell in self.artefact.columns],
            "titles": {name: self.recipe.titles[name] for name in self.artefact.sets},
            "values": [[*key, seeds] for key, seeds in values.items()],
            "reference": reference,
            "curves": self._curves() if self.artefact.kind in ("curves", "stages", "reversals") else {},
            "stage_steps": self.recipe.stage_steps,
            "betas": list(BETAS),
            "runs": {run.label: str(run.folder(self.root)) for run in self.runs},
        }

    def _reference(self, made: Evaluation) -> dict[str, float]:
        """Mean score of the reference by set, where a figure has its dashed line; {} elsewhere."""
        place = {"curves": "best", "stages": "reached", "bars": "reached"}.get(self.artefact.kind)
        if place is None:
            return {}
        found: dict[str, list[float]] = {}
        for seed in self.seeds:
            dapo = dapo_of(self.recipe, seed)
            others = tuple(name for name in self.artefact.sets if name != VALIDATION)
            drawn = made(Wanted(dapo, (place,), others)) if others else {}
            for name in self.artefact.sets:
                own = self.recipe.sets[name].name
                scores = score_of_run(dapo, self.root, own, place) if name == VALIDATION else drawn[name, place]
                found.setdefault(name, []).append(scores["metrics"]["pass@1"]["value"])
        return {name: sum(values) / len(values) for name, values in found.items()}

    def _curves(self) -> dict[str, Any]:
        """Return by row and seed the validation curve, and the shares of tokens that were turned, or would be."""
        out: dict[str, Any] = {}
        for row in self.rows:
            for seed, run in row.runs.items():
                metrics = read_run(run.folder(self.root))
                out.setdefault(row.entry.label, {})[str(seed)] = {
                    "curve": [list(point) for point in metrics.eval_column("pass@1")],
                    "reversed": [list(point) for point in metrics.column("reversed_fraction")],
                    "turned": [list(point) for point in metrics.column("turned_by_beta")],
                }
        return out


def table_of(result: dict[str, Any]) -> ScoreTable:
    """Lay a result out as the paper's table: a row per method, percent, means over the seeds."""
    if result["kind"] == "reversals":
        return reversal_table(result)
    values = {tuple(entry[:4]): 100 * sum(entry[4]) / len(entry[4]) for entry in result["values"]}
    columns = [tuple(cell) for cell in result["columns"]]
    by_checkpoint = len({metric for _, metric, _ in columns}) == 1
    rows, cells = [], []
    for label in result["rows"]:
        row: list[float | None] = [values.get((label, *cell)) for cell in columns]
        for index, (name, metric, place) in enumerate(columns):
            if name == AVERAGE:
                row[index] = _average(columns, row, metric, place)
        rows.append((result["model"], label))
        cells.append(row)
    headings = [
        (result["titles"].get(name, "Average"), place if by_checkpoint else metric.replace("pass@", "Pass@"))
        for name, metric, place in columns
    ]
    return ScoreTable(result["title"], headings, rows, cells, columns)


def _average(columns: Sequence[Any], row: Sequence[float | None], metric: str, place: str) -> float | None:
    parts = [
        value
        for (name, of, at), value in zip(columns, row, strict=True)
        if name != AVERAGE and (of, at) == (metric, place) and value is not None
    ]
    return sum(parts) / len(parts) if parts else None


def save(result: dict[str, Any], folder: Path) -> Path:
    """Write NAME.json and return it."""
    file = folder / f"{result['name']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(result, indent=1) + "\n")
    return file
