"""Configuration file of a comparison: methods, seeds and settings, on top of the configuration of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from owpo_megatron.config import Config, Section
from owpo_megatron.config.file import first_mistake, read_mapping
from owpo_megatron.config.method import MethodName
from owpo_megatron.errors import UserError
from owpo_megatron.evaluation.sets import sets_of_run

Kind = TypeVar("Kind", bound=Section)
Weights = Literal["final", "best", "reached"]
"""Policy of a finished run: the last one, the best one, or the first with the score of checkpoint.keep_at_score."""
Fields = dict[str, Any]
"""Dotted fields of a run and their values, e.g. {"verifier.flip": 0.15}."""


class Arm(Section):
    """One row of the table: a method, optionally with other fields. A plain name is short for label and method."""

    label: str
    """Name in tables and figures."""
    method: MethodName
    reference: Literal["trained", "own"] = "trained"
    """Reference: `trained` uses the comparison's trained one if the method needs a reference, fixed unless `set`
    changes that; `own` uses the run's own settings, starting at its initial policy (the ratchet without a prior)."""
    start: Literal["model", "reference"] = "model"
    """Initial policy: the configured model, or the comparison's trained reference, which any method can use."""
    set: Fields = {}
    """Fields of the run to override."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"label": value, "method": value} if isinstance(value, str) else value


class ReferenceRun(Section):
    """Run whose policy is the reference of the methods that need one; one run per seed."""

    method: MethodName = "dapo"
    steps: int = Field(10, gt=0)
    weights: Literal["final", "best"] = "final"
    """Weights to use; `best` has the best Pass@1 of its evaluations, as in the paper's two-stage protocol."""
    at_score: float | None = Field(None, gt=0, le=1)
    """Use its first weights whose evaluation has at least this Pass@1, instead of `weights`: the paper's suboptimal
    reference (0.30 on AIME24, section 5.3)."""
    seed_offset: int = 1000
    """Added to the seed, so that the reference has not seen the run's prompts and samples in the same order."""
    set: Fields = {}
    """Fields to override, in every setting."""

    @property
    def used(self) -> Weights:
        """Its weights that are the reference."""
        return self.weights if self.at_score is None else "reached"


class Setting(Section):
    """A setting in which all methods are compared."""

    set: Fields = {}
    """Fields to override in every run of the setting except the reference's."""
    reference_set: Fields = {}
    """Fields to override in the reference's run; settings without any share one reference."""


class Lab(Section):
    """A comparison. `Lab.load` reads and validates the file."""

    name: str = "lab"
    out_dir: Path = Path("runs")
    """Parent folder; runs, table.json, curves.json and figures go to out_dir/name."""
    runs_dir: Path | None = None
    """Folder of the run folders; comparisons that name the same one share their runs. Default: out_dir/name/runs."""
    run: dict[str, Any]
    """Configuration of a run, as for `owpo train`; the comparison sets name, runs_dir, seed and algorithm.name."""
    methods: list[Arm] = Field(min_length=1)
    """Methods to compare: names, or mappings with the fields of an arm."""
    against: str | None = None
    """Label of the arm that the others are compared with, seed by seed; default: the first."""
    seeds: list[int] = Field([1, 2, 3, 4, 5], min_length=1)
    metric: str = "pass@1"
    """Score to compare: pass@k, with k among those of the primary evaluation set (`eval.pass_at` without sets)."""
    equal_compute: bool = True
    """Also run methods without the trained reference longer, by its steps: the column "equal compute"."""
    reference: ReferenceRun | None = ReferenceRun()
    """Run that trains the reference; null: none."""
    regimes: dict[str, Setting] = {"plain": Setting()}
    """Settings by name, in each of which every method runs with every seed."""
    workers: int | None = Field(None, gt=0)
    """Concurrent runs, each with its own engine; default: one per core on a CPU, else (CUDA, run.engine.urls) one."""

    @field_validator("methods")
    @classmethod
    def _labels_differ(cls, methods: list[Arm]) -> list[Arm]:
        labels = [arm.label for arm in methods]
        for label in labels:
            if labels.count(label) > 1:
                raise UserError("methods", label, "appears twice; give one of them another label")
        return methods

    @model_validator(mode="after")
    def _no_contradictions(self) -> Lab:
        if self.against is not None and self.against not in [arm.label for arm in self.methods]:
            raise UserError("against", self.against, f"use one of {', '.join(arm.label for arm in self.methods)}")
        for arm in self.methods:
            if arm.start == "reference" and self.reference is None:
                raise UserError("methods.start", "reference", f"{arm.label}: the comparison trains no reference")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError("seeds", self.seeds, "a seed appears twice")
        run = self.base_run()
        primary = sets_of_run(run.eval, run.verifier.rule)[0]
        if self.metric not in primary.metrics():
            measured = ", ".join(primary.metrics())
            raise UserError("metric", self.metric, f"the primary evaluation set ({primary.title}) has {measured}")
        if not run.eval.every or not run.eval.before or not run.eval.after:
            raise UserError(
                "run.eval.every", run.eval.every, "curves need evaluations: set every > 0, before and after to true"
            )
        if run.engine.urls and (self.workers or 1) > 1:
            remedy = "runs that share engines would overwrite each other's weights; remove it or run.engine.urls"
            raise UserError("workers", self.workers, remedy)
        return self

    @property
    def workers_wanted(self) -> int | None:
        return 1 if self.base_run().engine.urls else self.workers

    def base_run(self) -> Config:
        """Return the configuration of the run that every arm is based on."""
        return Config.build(self.run)

    @property
    def folder(self) -> Path:
        return self.out_dir / self.name

    @property
    def root(self) -> Path:
        return self.runs_dir or self.folder / "runs"

    @property
    def main_label(self) -> str:
        return self.against or self.methods[0].label

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Lab:
        """Read a YAML file and apply `dotted.field=value` overrides. Raises as `load_section`."""
        return load_section(cls, path, overrides)


def load_section(kind: type[Kind], path: Path, overrides: Sequence[str] = ()) -> Kind:
    """Read a YAML file of this kind and apply `dotted.field=value` overrides.

    Raises:
        UserError: the file is missing or not YAML, or a field is unknown, ill-typed or contradictory.
    """
    return built(kind, read_mapping(path, overrides))


def built(kind: type[Kind], raw: Mapping[str, Any]) -> Kind:
    """Validate a mapping; the first mistake raises a UserError."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise first_mistake(error, kind) from error


def with_fields(config: Config, fields: Fields) -> Config:
    """Return a copy of a configuration with some dotted fields set.

    Raises:
        UserError: a field is unknown or its value is invalid.
    """
    raw = config.model_dump(mode="json")
    if "refresh" not in config.reference.model_fields_set:
        del raw["reference"]["refresh"]  # each method has its own
    for dotted, value in fields.items():
        *parents, leaf = dotted.split(".")
        node: Any = raw
        for name in parents:
            node = node.get(name)
            if not isinstance(node, dict):
                raise UserError("set", dotted, "no such field of a run; write section.field, e.g. verifier.flip")
        node[leaf] = value
    return Config.build(raw)
