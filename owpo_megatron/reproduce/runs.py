"""Runs of a table or figure: its entries as specifications, with the references that they share."""

from __future__ import annotations

from dataclasses import dataclass

from owpo_megatron.errors import UserError
from owpo_megatron.experiments.lab import Fields, Weights, with_fields
from owpo_megatron.experiments.spec import RunSpec
from owpo_megatron.methods import find_method, hyper_parameters
from owpo_megatron.reproduce.artefacts import DAPO, Artefact, Entry
from owpo_megatron.reproduce.recipe import Recipe, methods_with

_WEIGHTS: dict[str, Weights] = {"best": "best", "prior": "reached"}
_OWN = {
    "name": "runs have names of their own; choose the folder with --out",
    "runs_dir": "choose the folder with --out",
    "model.path": "use --model",
    "seed": "use --seeds",
    "algorithm.name": "each run has its own; owpo compare takes any methods",
    "reference.path": "each run has its own, a checkpoint of the DAPO run; owpo compare takes another",
    "reference.refresh": "each run has its own: fixed, or the best of each stage; owpo compare takes another",
}
"""Fields that a run of the paper has by its row, with what to do instead of setting them."""


@dataclass(frozen=True)
class Row:
    """An entry with its run for each seed."""

    entry: Entry
    runs: dict[int, RunSpec]


def rows_of(artefact: Artefact, recipe: Recipe, seeds: list[int]) -> list[Row]:
    """Return the rows of a table or the curves of a figure, in its order."""
    return [Row(entry, {seed: run_of(entry, recipe, seed) for seed in seeds}) for entry in artefact.entries]


def check_changes(artefact: Artefact, recipe: Recipe) -> None:
    """Refuse a change that would reach none of the runs.

    Raises:
        UserError: the field is each run's own, or no method here has the hyper-parameter, or its rows vary it.
    """
    for dotted, value in recipe.changed.items():
        if dotted in _OWN:
            raise UserError(dotted, value, _OWN[dotted])
        having = methods_with(dotted)
        owners = [one for one in artefact.entries if one.method in having]
        if having and all(dotted in one.set for one in owners):
            what = f"each row of {artefact.name} has its own" if owners else f"no method of {artefact.name} has it"
            raise UserError(dotted, value, f"{what}; leave it out")


def dapo_of(recipe: Recipe, seed: int) -> RunSpec:
    """Return the run whose checkpoints are the references of all others: the DAPO row itself (section 5.1)."""
    return run_of(DAPO, recipe, seed)


def run_of(entry: Entry, recipe: Recipe, seed: int) -> RunSpec:
    """Return the specification of an entry's run with this seed."""
    fields: Fields = {"seed": seed, "algorithm.name": entry.method}
    fields |= {"checkpoint.keep_best": True, "checkpoint.export_hf": False}
    fields |= _not_default(entry.method, recipe.fields_of(entry.method) | entry.set)
    if entry == DAPO:
        fields["checkpoint.keep_at_score"] = recipe.prior_score
    if entry.guide != "none":
        fields["reference.refresh"] = "fixed"
    if entry.stages is not None:
        fields |= {"reference.refresh": "best_of_stage", "reference.every": recipe.stage_steps}
        fields["optimizer.steps"] = entry.stages * recipe.stage_steps
    label = "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in entry.label.replace(" ", ""))
    suffix = "" if entry.guide in ("none", "base", "best") else "-stages" if entry.stages else "-prior"
    config = with_fields(recipe.run, fields)
    if entry.guide not in _WEIGHTS:
        return RunSpec(f"{label}{suffix}-s{seed}", config)
    return RunSpec(f"{label}{suffix}-s{seed}", config, dapo_of(recipe, seed), weights=_WEIGHTS[entry.guide])


def _not_default(method: str, fields: Fields) -> Fields:
    """Leave out hyper-parameters at their default: Table 4's row of the chosen beta is then the run of Table 2."""
    known = hyper_parameters(find_method(method))
    defaults = {f"algorithm.{name}": one.default for name, one in known.items()}
    return {name: value for name, value in fields.items() if name not in defaults or defaults[name] != value}
