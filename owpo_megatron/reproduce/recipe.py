"""Base of every run of a reproduction: a scale (the paper's, or two CPU cores) and a preset of readings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from owpo_megatron.config import Config, Section, SetConfig
from owpo_megatron.config.file import apply_override, parse_value, read_mapping
from owpo_megatron.data.tasks.cipher import Cipher
from owpo_megatron.engine.install import project_files
from owpo_megatron.errors import UserError
from owpo_megatron.evaluation.sets import SETS
from owpo_megatron.experiments.lab import Fields, built, with_fields
from owpo_megatron.methods import catalogue, hyper_parameters
from owpo_megatron.report.published import paper_model

Scale = Literal["paper", "cpu"]
PRESETS = ("paper", "recommended")
HERE = Path(__file__).parent
EXAMPLES = {"Qwen2.5-Math-7B": "qwen2.5-math-7b", "Qwen3-8B-Base": "qwen3-8b-base"}
PRIOR_SCORE = 0.30  # Pass@1 on AIME24 of the suboptimal reference (section 5.3)
STAGE_STEPS = 80  # appendix B.4


class Preset(Section):
    """Readings of the paper's text, as fields of runs."""

    readings: Fields = {}
    """Fields at every scale."""
    setup: Fields = {}
    """Fields at the paper's scale only."""
    methods: dict[str, Fields] = {}
    """Fields of single methods."""


class StandIn(Section):
    """Cipher problems in place of one of the paper's sets."""

    title: str
    length: int = Field(gt=0)
    """Symbols of a problem."""
    problems: tuple[int, int]
    """First problem of the test split, and the one behind the last."""
    samples: int = Field(gt=0)


class CpuScale(Section):
    """The file cpu.yaml."""

    run: dict[str, Any]
    prior_score: float = Field(gt=0, le=1)
    sets: dict[str, StandIn]


@dataclass(frozen=True)
class Recipe:
    """Base of every run.

    Args:
        run: configuration without method, seed and reference.
        sets: evaluation set by the paper's name of it.
        titles: its name in tables.
        methods: fields of single methods, by name.
        prior_score: Pass@1 on the validation set of the suboptimal reference.
        model: the paper's model; None: it has none like this.
        changed: what the user changed, every run's fields and those of single methods.
    """

    scale: Scale
    run: Config
    sets: Mapping[str, SetConfig]
    titles: Mapping[str, str]
    methods: Mapping[str, Fields]
    prior_score: float
    model: str | None
    changed: Fields = field(default_factory=dict)

    @property
    def stage_steps(self) -> int:
        """Steps of a stage of self-evolution."""
        return self.run.reference.every

    def fields_of(self, method: str) -> Fields:
        return dict(self.methods.get(method, {}))


def preset(name: str) -> Preset:
    """Return a preset of presets.yaml.

    Raises:
        UserError: there is none of this name.
    """
    if name not in PRESETS:
        raise UserError("--preset", name, f"use one of {', '.join(PRESETS)}")
    return built(Preset, read_mapping(HERE / "presets.yaml")[name])


def paper_recipe(model: Path, chosen: Preset, overrides: Sequence[str], named: str | None) -> Recipe:
    """Return the recipe at the paper's scale: examples/MODEL/config.yaml with the preset's readings.

    Args:
        named: the paper's model that this is, if its folder has another name.

    Raises:
        UserError: the model is none of the paper's, or an override is wrong.
    """
    name = paper_model(model.name, named)
    raw = read_mapping(project_files() / "examples" / EXAMPLES[name] / "config.yaml")
    raw["model"]["path"] = str(model)
    sets = {name: SetConfig(name=name) for name in ("aime24", "aime25", "amc", "gpqa", "mmlu_pro")}
    titles = {name: SETS[name].title for name in sets}
    draft = Recipe("paper", Config.build(raw), sets, titles, chosen.methods, PRIOR_SCORE, name)
    return _with(draft, {"reference.every": STAGE_STEPS} | chosen.readings | chosen.setup, overrides)


def cpu_recipe(model: Path | None, chosen: Preset, overrides: Sequence[str], data: Path) -> Recipe:
    """Return the recipe of cpu.yaml; the sets' files are written to `data`.

    Raises:
        UserError: an override is wrong.
    """
    scale = built(CpuScale, read_mapping(HERE / "cpu.yaml"))
    raw = scale.run
    if model is not None:
        raw["model"]["path"] = str(model)
    sets = {name: _written(stand_in, data) for name, stand_in in scale.sets.items()}
    validation = sets["aime24"]
    raw["eval"]["sets"] = [validation.model_dump(mode="json", exclude_none=True)]
    titles = {name: stand_in.title for name, stand_in in scale.sets.items()}
    draft = Recipe("cpu", Config.build(raw), sets, titles, chosen.methods, scale.prior_score, None)
    return _with(draft, chosen.readings, overrides)


def _with(draft: Recipe, fields: Fields, overrides: Sequence[str]) -> Recipe:
    """The recipe with the preset's fields, then the user's: those of every run, and those that some methods have."""
    raw = with_fields(draft.run, {"name": "reproduction"} | fields).model_dump(mode="json", exclude_unset=True)
    changed: Fields = {}
    methods = {name: dict(own) for name, own in draft.methods.items()}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        owners = methods_with(dotted) if equals else []
        if not owners:
            apply_override(raw, override)
        changed[dotted] = parse_value(text, dotted)
        for name in owners:
            methods.setdefault(name, {})[dotted] = changed[dotted]
    config = Config.build(raw)
    wanted = config.checkpoint.keep_at_score  # of the run that is the reference; the others keep no such checkpoint
    return replace(
        draft,
        run=with_fields(config, {"checkpoint.keep_at_score": None}) if wanted else config,
        methods=methods,
        prior_score=wanted or draft.prior_score,
        changed=changed,
    )


def methods_with(dotted: str) -> list[str]:
    """Methods that have this hyper-parameter, e.g. "algorithm.penalty"; none for a field of every run."""
    section, _, name = dotted.partition(".")
    return [method for method, kind in catalogue().items() if section == "algorithm" and name in hyper_parameters(kind)]


def _written(stand_in: StandIn, folder: Path) -> SetConfig:
    """Write the problems to a file and return it as an evaluation set."""
    name = stand_in.title.lower()
    file = folder / f"{name}.jsonl"
    problems = Cipher(length=stand_in.length).problems("test")[slice(*stand_in.problems)]
    lines = [json.dumps({"problem": one.text, "answer": one.answer, "domain": one.domain}) for one in problems]
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")
    pass_at = [1, 16] if stand_in.samples >= 16 else [1]
    return SetConfig(name=name, source=str(file), samples=stand_in.samples, pass_at=pass_at)
