"""Compare methods over seeds and settings, with the same base model, data order and rollout budget."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from owpo_megatron.experiments.lab import Arm, Lab, Setting, with_fields
from owpo_megatron.experiments.outcome import Outcome, read_outcome
from owpo_megatron.experiments.pool import Failure, OnEvent, run_all
from owpo_megatron.experiments.spec import RunSpec
from owpo_megatron.experiments.statistics import MeanInterval, mean_interval, paired_difference
from owpo_megatron.methods import make_method
from owpo_megatron.run.files import write_whole


@dataclass(frozen=True)
class Cell:
    """One arm in one setting with one seed.

    `longer`, for an arm that does not use the trained reference, is the same run with the reference's steps added: its
    result at equal total compute.
    """

    setting: str
    arm: Arm
    seed: int
    run: RunSpec
    longer: RunSpec | None


def compare(lab: Lab, on_event: OnEvent = lambda event, spec: None) -> tuple[dict[str, Any], list[Failure]]:
    """Execute the missing runs, then write table.json and curves.json; return the table and the failures.

    The table covers the finished runs.
    """
    cells = plan(lab)
    failures = run_all(specs_of(cells), lab.root, lab.workers_wanted, on_event)
    return write_table(lab, cells), failures


def plan(lab: Lab) -> list[Cell]:
    """Return all cells in the order of execution: by setting, by seed, methods in the file's order."""
    return [
        _cell(lab, name, setting, arm, seed)
        for name, setting in lab.regimes.items()
        for seed in lab.seeds
        for arm in lab.methods
    ]


def specs_of(cells: list[Cell]) -> list[RunSpec]:
    """Return the runs of the cells; the longer ones last, since only one column of the table needs them."""
    return [cell.run for cell in cells] + [cell.longer for cell in cells if cell.longer]


def _cell(lab: Lab, name: str, setting: Setting, arm: Arm, seed: int) -> Cell:
    base = lab.base_run()
    label = f"{name}-{arm.label}-s{seed}"
    fields = {"seed": seed, "algorithm.name": arm.method, "checkpoint.export_hf": False}
    config = with_fields(base, fields | setting.set | arm.set)
    reference = _reference(lab, setting, seed)
    if lab.reference is None or reference is None:
        return Cell(name, arm, seed, RunSpec(label, config), None)
    weights = lab.reference.used
    start = reference if arm.start == "reference" else None
    if arm.reference == "trained" and make_method(arm.method).needs_reference != "none":
        fixed = with_fields(config, {"reference.refresh": "fixed"} | arm.set)
        return Cell(name, arm, seed, RunSpec(label, fixed, reference, start, weights), None)
    if start:
        return Cell(name, arm, seed, RunSpec(label, config, None, start, weights), None)
    if not lab.equal_compute:
        return Cell(name, arm, seed, RunSpec(label, config), None)
    steps = config.optimizer.steps + reference.config.optimizer.steps
    longer = RunSpec(f"{label}-{steps}", with_fields(config, {"optimizer.steps": steps}))
    return Cell(name, arm, seed, RunSpec(label, config), longer)


def _reference(lab: Lab, setting: Setting, seed: int) -> RunSpec | None:
    wanted = lab.reference
    if wanted is None:
        return None
    own = {
        "seed": seed + wanted.seed_offset,
        "algorithm.name": wanted.method,
        "optimizer.steps": wanted.steps,
        "checkpoint.export_hf": wanted.weights == "final",
    }
    if wanted.used == "best":
        own["checkpoint.keep_best"] = True
    if wanted.used == "reached":
        own |= {"checkpoint.keep_at_score": wanted.at_score, "checkpoint.export_hf": False}
    config = with_fields(lab.base_run(), own | wanted.set | setting.reference_set)
    return RunSpec(f"reference-{wanted.method}-s{config.seed}", config)


# ---------------------------------------------------------------------------------------------- the table
def write_table(lab: Lab, cells: list[Cell]) -> dict[str, Any]:
    """Write table.json and curves.json of the finished runs; return the table."""
    outcomes = {
        spec.key: read_outcome(spec.folder(lab.root), lab.metric)
        for cell in cells
        for spec in (cell.run, cell.longer, *cell.run.needs)
        if spec is not None and spec.is_done(lab.root)
    }
    settings = {name: _setting_table(lab, [c for c in cells if c.setting == name], outcomes) for name in lab.regimes}
    table = {
        "name": lab.name,
        "metric": lab.metric,
        "against": lab.main_label,
        "seeds": lab.seeds,
        "steps": lab.base_run().optimizer.steps,
        "equal_compute": lab.equal_compute,
        "reference": lab.reference.model_dump(mode="json") if lab.reference else None,
        "regimes": settings,
    }
    _write(lab.folder / "table.json", table)
    _write(lab.folder / "curves.json", _curves(lab, cells, outcomes))
    return table


def _setting_table(lab: Lab, cells: list[Cell], outcomes: dict[str, Outcome]) -> dict[str, Any]:
    main = _Column(lab.main_label, cells, outcomes)
    columns = [_Column(arm.label, cells, outcomes) for arm in lab.methods]
    references = {cell.seed: outcomes[one.key] for cell in cells for one in cell.run.needs if one.key in outcomes}
    used = {seed: _used(lab, outcome) for seed, outcome in references.items()}
    bases = [outcomes[cell.run.key].first for cell in cells if cell.run.start is None and cell.run.key in outcomes]
    return {
        "base": sum(bases) / len(bases) if bases else None,
        "reference": _spread({seed: outcome.final for seed, outcome in references.items()}),
        "reference_best": _spread({seed: outcome.best for seed, outcome in references.items()}),
        "reference_used": _spread({seed: score for seed, score in used.items() if score is not None}),
        "entries": [column.row(main) for column in columns if column.runs],
    }


def _used(lab: Lab, outcome: Outcome) -> float | None:
    """Score of the weights that are the reference; None if it never had the wanted one."""
    assert lab.reference is not None
    if lab.reference.at_score is not None:
        return outcome.reached(lab.reference.at_score)
    return outcome.best if lab.reference.weights == "best" else outcome.final


class _Column:
    """Outcomes of one arm, by seed."""

    def __init__(self, label: str, cells: list[Cell], outcomes: dict[str, Outcome]):
        mine = [cell for cell in cells if cell.arm.label == label]
        self.label = label
        self.method = mine[0].arm.method
        self.runs = {cell.seed: outcomes[cell.run.key] for cell in mine if cell.run.key in outcomes}
        total: dict[int, tuple[float, int]] = {}  # score at equal total compute, token passes including the reference's
        for cell in mine:
            if cell.longer is not None and cell.longer.key in outcomes:
                longer = outcomes[cell.longer.key]
                total[cell.seed] = (longer.final, longer.token_passes)
            elif cell.longer is None and cell.run.key in outcomes:
                run = outcomes[cell.run.key]
                spent = sum(outcomes[key].token_passes for key in {one.key for one in cell.run.needs} & outcomes.keys())
                total[cell.seed] = (run.final, run.token_passes + spent)
        self.total_score = {seed: score for seed, (score, _) in total.items()}
        self.total_passes = {seed: float(passes) for seed, (_, passes) in total.items()}

    @property
    def auc(self) -> dict[int, float]:
        return {seed: run.auc for seed, run in self.runs.items()}

    @property
    def final(self) -> dict[int, float]:
        return {seed: run.final for seed, run in self.runs.items()}

    def row(self, main: _Column) -> dict[str, Any]:
        """Return the arm's row of the table; `minus` contains the paired differences main - this arm."""
        row: dict[str, Any] = {"label": self.label, "method": self.method}
        row |= {"final": _spread(self.final), "auc": _spread(self.auc)}
        row["best"] = _spread({seed: run.best for seed, run in self.runs.items()})
        row |= {"equal_compute": _spread(self.total_score), "total_token_passes": _spread(self.total_passes)}
        if main.label != self.label:
            pairs = [("final", main.final, self.final), ("auc", main.auc, self.auc)]
            pairs.append(("equal_compute", main.total_score, self.total_score))
            row["minus"] = {name: _plain(paired_difference(ours, theirs)) for name, ours, theirs in pairs}
        return row


def _spread(values: dict[int, float]) -> dict[str, Any] | None:
    """Return the values by seed and their mean with its interval; None without values."""
    if not values:
        return None
    by_seed = {str(seed): value for seed, value in sorted(values.items())}
    return {"seeds": by_seed} | asdict(mean_interval(list(values.values())))


def _plain(found: MeanInterval | None) -> dict[str, Any] | None:
    return asdict(found) if found else None


def _curves(lab: Lab, cells: list[Cell], outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Return the data of the figures: by setting and arm, each seed's held-out curve and training columns."""
    out: dict[str, Any] = {name: {} for name in lab.regimes}
    for cell in cells:
        outcome = outcomes.get(cell.run.key)
        if outcome is not None:
            training = {name: [round(value, 5) for value in values] for name, values in outcome.training.items()}
            out[cell.setting].setdefault(cell.arm.label, {})[str(cell.seed)] = {
                "curve": outcome.curve,
                "training": training,
            }
    return out


def _write(file: Path, content: dict[str, Any]) -> None:
    write_whole(file, json.dumps(content, indent=1) + "\n")
