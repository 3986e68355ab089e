"""The file of a comparison: which methods, seeds and regimes, on top of one ordinary run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from owpo_megatron.config import Config, Section
from owpo_megatron.config.file import first_mistake, read_mapping
from owpo_megatron.config.method import AlgorithmName
from owpo_megatron.errors import UserError

Kind = TypeVar("Kind", bound=Section)
Fields = dict[str, Any]
"""Dotted fields of a run and their values, e.g. {"verifier.flip": 0.15}."""


class Entry(Section):
    """One line of the table: a method, perhaps with other settings. A plain name in the file is short for itself."""

    label: str
    """Its name in tables and figures."""
    method: AlgorithmName
    reference: Literal["trained", "own"] = "trained"
    """`trained`: the lab's, where the method takes one, and fixed if `set` does not say otherwise; `own`: none but what
    the run's settings say, from its initial policy on (the ratchet without a prior)."""
    start: Literal["model", "reference"] = "model"
    """`reference`: the policy starts from the lab's trained reference, which any method can make use of so."""
    set: Fields = {}
    """Fields of the run that differ."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"label": value, "method": value} if isinstance(value, str) else value


class ReferenceRun(Section):
    """The run whose final policy is the reference of the methods that take one; one for each seed."""

    method: AlgorithmName = "dapo"
    steps: int = Field(10, gt=0)
    weights: Literal["final", "best"] = "final"
    """`best`: those with the best Pass@1 of its evaluations, as the paper's two-stage protocol takes them."""
    seed_offset: int = 1000
    """Added to the seed, so that the reference has not met the run's prompts and samples in the same order."""
    set: Fields = {}
    """Fields that differ, in every regime."""


class Regime(Section):
    """A circumstance in which all methods are compared."""

    set: Fields = {}
    """Fields of every run of the regime, the reference's excepted."""
    reference_set: Fields = {}
    """Fields of the reference's run; a regime that leaves it out shares its reference with the others."""


class Lab(Section):
    """A comparison. `Lab.load` reads the file and raises `UserError` for what is wrong."""

    name: str = "lab"
    out_dir: Path = Path("runs")
    """The lab's files go to out_dir/name: its runs, table.json, curves.json, the figures."""
    runs_dir: Path | None = None
    """Folder of the run folders; comparisons that name the same one share their runs. None: runs/ among its files."""
    run: dict[str, Any]
    """An ordinary run, as `owpo train` takes it; its name, runs_dir, seed and algorithm.name are set by the lab."""
    methods: list[Entry] = Field(min_length=1)
    against: str | None = None
    """The entry that the others are compared with, seed by seed; None: the first."""
    seeds: list[int] = Field([1, 2, 3, 4, 5], min_length=1)
    metric: str = "pass@1"
    """The evaluation's score that is compared."""
    reference: ReferenceRun | None = ReferenceRun()
    regimes: dict[str, Regime] = {"plain": Regime()}
    workers: int | None = Field(None, gt=0)
    """Runs at a time, each with an engine of its own; None: one a core (CPU), one (CUDA or with run.engine.urls)."""

    @field_validator("methods")
    @classmethod
    def _labels_differ(cls, methods: list[Entry]) -> list[Entry]:
        labels = [entry.label for entry in methods]
        for label in labels:
            if labels.count(label) > 1:
                raise UserError("methods", label, "stands there twice; give one of them another label")
        return methods

    @model_validator(mode="after")
    def _no_contradictions(self) -> Lab:
        if self.against is not None and self.against not in [entry.label for entry in self.methods]:
            raise UserError("against", self.against, f"is none of {', '.join(e.label for e in self.methods)}")
        for entry in self.methods:
            if entry.start == "reference" and self.reference is None:
                raise UserError("methods.start", "reference", f"{entry.label}: this lab trains no reference")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError("seeds", self.seeds, "a seed stands there twice")
        run = self.base_run()
        k = self.metric.removeprefix("pass@")
        if not k.isdigit() or int(k) not in run.eval.pass_at:
            raise UserError("metric", self.metric, f"give pass@k with k one of eval.pass_at = {run.eval.pass_at}")
        if not run.eval.every or not run.eval.before or not run.eval.after:
            raise UserError(
                "run.eval.every", run.eval.every, "curves need evaluations: every > 0, and before and after on"
            )
        if run.engine.urls and (self.workers or 1) > 1:
            remedy = "runs that share engines would overwrite each other's weights; leave it out, or run.engine.urls"
            raise UserError("workers", self.workers, remedy)
        return self

    @property
    def workers_wanted(self) -> int | None:
        return 1 if self.base_run().engine.urls else self.workers

    def base_run(self) -> Config:
        """The ordinary run that every entry starts from."""
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
        """Read a YAML file and apply `dotted.field=value` overrides; raises as `load_section`."""
        return load_section(cls, path, overrides)


def load_section(kind: type[Kind], path: Path, overrides: Sequence[str] = ()) -> Kind:
    """A file of this kind, with `dotted.field=value` overrides.

    Raises:
        UserError: the file is missing or not YAML, or a field is unknown, ill-typed or contradictory.
    """
    try:
        return kind.model_validate(read_mapping(path, overrides))
    except ValidationError as error:
        raise first_mistake(error, kind) from error


def with_fields(config: Config, fields: Fields) -> Config:
    """The run with some dotted fields set.

    Raises:
        UserError: a field is unknown or its value does not fit.
    """
    raw = config.model_dump(mode="json")
    for dotted, value in fields.items():
        *parents, leaf = dotted.split(".")
        node: Any = raw
        for name in parents:
            node = node.get(name)
            if not isinstance(node, dict):
                raise UserError("set", dotted, "no such field of a run; write section.field, e.g. verifier.flip")
        node[leaf] = value
    return Config.build(raw)
