"""Jobs of an evaluation: every target with its tokenizer and sets, checked before an engine starts."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from owpo_megatron.api.exporting import as_hf
from owpo_megatron.config import Config, DataConfig, SetConfig, hf_folder
from owpo_megatron.config.file import apply_override, read_mapping
from owpo_megatron.data import PromptTemplate, Tokenizer, load_prompts, load_tokenizer
from owpo_megatron.data.tokenizer import check_tokenizer_files
from owpo_megatron.errors import UserError
from owpo_megatron.evaluation.chains import check_chains
from owpo_megatron.evaluation.draw import DrawProgress
from owpo_megatron.evaluation.prepare import PreparedSet, held_out, prepare
from owpo_megatron.evaluation.results import date_of
from owpo_megatron.evaluation.serve import (
    DEFAULT_MAX_TOKENS,
    evaluate_weights,
    response_limit,
    stored_dtype,
    weight_files,
)
from owpo_megatron.evaluation.sets import (
    HELD_OUT,
    SETS,
    EvalSet,
    data_folder,
    narrowed,
    resolve,
    sets_of_run,
    source_of,
)
from owpo_megatron.evaluation.targets import Target, model_target, run_targets
from owpo_megatron.hub import model_folder
from owpo_megatron.methods import find_method
from owpo_megatron.run.checkpoints import began_on
from owpo_megatron.run.layout import HF, RunFolder

TEMPLATES = ("auto", "chat", "completion", "raw")


@dataclass(frozen=True)
class Wish:
    """The options that hold for every target."""

    sets: tuple[SetConfig, ...]  # empty: those of each run's configuration
    samples: int | None
    limit: int | None
    data: Path | None
    max_tokens: int | None
    template: str
    seed: int
    fresh: bool
    chain: str | None = None  # rule that judges the reasoning, for every set; None: that of each


@dataclass(frozen=True)
class Job:
    """A target with everything that can be checked before an engine starts."""

    target: Target
    tokenizer: Tokenizer
    sets: list[PreparedSet]
    max_tokens: int

    def notes(self) -> list[str]:
        """Remarks on sets of an unexpected size."""
        return [one.complaint for one in self.sets if one.complaint]

    def row(self, checkpoint: str) -> dict[str, str]:
        """Names of its row in a table."""
        return {"model": self.target.model, "method": self.target.method, "checkpoint": checkpoint}

    def run(
        self,
        wish: Wish,
        watch: Callable[[PreparedSet], DrawProgress | None],
        waiting: Callable[[str], AbstractContextManager[object]] = nullcontext,
    ) -> list[dict[str, Any]]:
        """The scores of every set; `watch` and `waiting` as in `evaluate_weights`. Raises EngineError as `evaluate`."""
        weights, out = self.target.weights, self.target.out
        return evaluate_weights(
            weights,
            partial(as_hf, weights, out / HF),
            self.target.config,
            self.sets,
            self.tokenizer,
            self.max_tokens,
            wish.seed,
            out,
            wish.fresh,
            watch,
            waiting,
        )


def prepared_jobs(
    models: Sequence[Path],
    runs: Sequence[Path],
    checkpoints: Sequence[str],
    overrides: Sequence[str],
    wish: Wish,
    folder: Path | None,
    log: Callable[[str], None] = print,
) -> list[Job]:
    """Every target with its sets, checked; nothing is started.

    Raises:
        UserError: a mistake in any of them.
    """
    if wish.template not in TEMPLATES and not wish.template.endswith((".jinja", ".jinja2")):
        raise UserError("--template", wish.template, f"use one of {', '.join(TEMPLATES)}, or the path of a .jinja file")
    models = [model_folder(one, "--model", log) for one in models]
    targets = [model_target(one, _config_of_model(one, overrides), folder) for one in models]
    for run in runs:
        if not RunFolder(run).config.is_file():
            raise UserError("--run", run, "has no config.yaml; give a run folder, e.g. runs/quickstart")
        targets += run_targets(run, _config_of_run(run, overrides), checkpoints, folder)
    for target in targets:  # before anything that takes seconds
        check_tokenizer_files(target.files)
        weight_files(target.weights)
    return [_prepared(target, wish) for target in targets]


def _config_of_run(run: Path, overrides: Sequence[str]) -> Config:
    """Its method may be one that was given from Python and is not known here: an evaluation does not need it."""
    raw = read_mapping(RunFolder(run).config, overrides)
    try:
        find_method(raw.get("algorithm", {}).get("name", "owpo"))
    except UserError:
        raw = {name: value for name, value in raw.items() if name not in ("algorithm", "teachers")}
    return Config.build(raw)


def _config_of_model(model: Path, overrides: Sequence[str]) -> Config:
    files = hf_folder(model, "--model")
    raw: dict[str, Any] = {
        "model": {"path": str(model), "dtype": stored_dtype(files)},
        "data": {"source": "-", "template": "chat"},
    }
    for override in overrides:
        apply_override(raw, override)
    return Config.build(raw)


def _prepared(target: Target, wish: Wish) -> Job:
    tokenizer = load_tokenizer(target.files)
    tokenizer.check_stop(target.config.rollout.stop)
    template, longest = "chat" if tokenizer.has_chat_template else "completion", DEFAULT_MAX_TOKENS
    if target.checkpoints:  # a run: as it was trained
        template, longest = target.config.data.template, target.config.rollout.max_response_tokens
    if wish.template != "auto":
        template = wish.template
    own = target.config.data.model_copy(update={"template": template})
    kept = None if wish.fresh else date_of(target.out)
    date = own.date or kept or began_on(target.weights) or datetime.date.today()
    folder = data_folder(wish.data or target.config.eval.data_dir)
    made = PromptTemplate.of(own, tokenizer, date)
    specs = [replace(one, chain=wish.chain or one.chain) for one in _specs(target, wish)]
    check_chains(specs, target.config.verifier.proxy)
    sets = [_set(spec, target, folder, made, own, wish.seed) for spec in specs]
    # What lies between the turns of an episode is rendered as its opening is.
    config = target.config.model_copy(update={"data": own.model_copy(update={"date": date})})
    limit = response_limit(target.files, sets, wish.max_tokens, longest)
    return Job(replace(target, config=config), tokenizer, sets, limit)


def _specs(target: Target, wish: Wish) -> list[EvalSet]:
    if wish.sets:
        return [_like_the_run(resolve(one, target.config.eval), one, target) for one in wish.sets]
    if not target.checkpoints:
        raise UserError(
            "--sets",
            "(none)",
            "name a set, e.g. --sets aime24,amc or --set mine=FILE (known ones: --list)",
        )
    return [
        narrowed(one, wish.samples, wish.limit) for one in sets_of_run(target.config.eval, target.config.verifier.rule)
    ]


def _like_the_run(spec: EvalSet, wanted: SetConfig, target: Target) -> EvalSet:
    """A file of the user's own, evaluated for a run: sampled and graded as the run's own held-out problems are."""
    if spec.name in SETS or not target.checkpoints:
        return spec
    wants = target.config.eval
    samples = wanted.samples or wants.samples
    return replace(
        spec,
        samples=samples,
        pass_at=tuple(k for k in wants.pass_at if k <= samples) or (1,),
        temperature=wants.temperature,
        top_p=wants.top_p,
        rule=target.config.verifier.rule,
        instruction="none",
    )


def _set(
    spec: EvalSet, target: Target, folder: Path | None, template: PromptTemplate, own: DataConfig, seed: int
) -> PreparedSet:
    if spec.name == HELD_OUT and spec.source is None:
        prompts, report = load_prompts(target.config.data, template.tokenizer, "test", spec.limit, template.date)
        one = held_out(spec, prompts, report.source)
    elif spec.name not in SETS and target.checkpoints:
        data = own.model_copy(update={"eval_source": spec.source})
        prompts, report = load_prompts(data, template.tokenizer, "test", spec.limit, template.date)
        one = held_out(spec, prompts, str(report))
    else:
        return prepare(spec, source_of(spec, folder), template, seed)
    return replace(one, date=str(template.date)) if template.depends_on_date else one
