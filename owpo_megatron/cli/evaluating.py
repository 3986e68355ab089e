"""Evaluation as `owpo eval` runs it: targets, sets, one engine after the other, tables."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from owpo_megatron.cli.exporting import as_hf
from owpo_megatron.cli.hub import model_folder
from owpo_megatron.cli.options import err, out, wide
from owpo_megatron.config import Config, DataConfig, SetConfig, hf_folder
from owpo_megatron.config.file import apply_override
from owpo_megatron.data import PromptTemplate, Tokenizer, load_prompts, load_tokenizer
from owpo_megatron.errors import UserError
from owpo_megatron.evaluation.prepare import PreparedSet, held_out, prepare
from owpo_megatron.evaluation.results import date_of
from owpo_megatron.evaluation.serve import DEFAULT_MAX_TOKENS, evaluate_weights, response_limit, stored_dtype
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
from owpo_megatron.report.scores import Scored, details, score_tables, write_tables
from owpo_megatron.run.checkpoints import began_on

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


@dataclass(frozen=True)
class Job:
    """A target with everything that can be checked before an engine starts."""

    target: Target
    tokenizer: Tokenizer
    sets: list[PreparedSet]
    max_tokens: int


def evaluate_all(
    models: Sequence[Path],
    runs: Sequence[Path],
    checkpoints: Sequence[str],
    overrides: Sequence[str],
    wish: Wish,
    folder: Path | None,
    json_file: Path | None,
) -> None:
    """Evaluate every target on every set, print the tables, write table.json and a figure.

    Raises:
        UserError: a mistake in any of them; nothing was started.
        EngineError: an engine does not start, or stays dead; what was drawn is kept.
    """
    if wish.template not in TEMPLATES and not wish.template.endswith((".jinja", ".jinja2")):
        raise UserError("--template", wish.template, f"use one of {', '.join(TEMPLATES)}, or the path of a .jinja file")
    models = [model_folder(one, "--model") for one in models]
    targets = [model_target(one, _config_of_model(one, overrides), folder) for one in models]
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise UserError("--run", run, "has no config.yaml; give a run folder, e.g. runs/quickstart")
        targets += run_targets(run, Config.load(run / "config.yaml", overrides), checkpoints, folder)
    jobs = [_prepared(target, wish) for target in targets]
    for complaint in dict.fromkeys(one.complaint for job in jobs for one in job.sets):
        if complaint:
            err.print(f"[yellow]note:[/yellow] {escape(complaint)}")
    scored = []
    for job in jobs:
        scores = _evaluate(job, wish)
        by_set = {str(one["set"]): one for one in scores}
        scored += [
            Scored(job.target.model, job.target.method, place, by_set) for place in job.target.checkpoints or ("",)
        ]
    _show(scored, _table_folder(targets, folder), json_file)


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
    sets = [_set(spec, target, folder, made, own, wish.seed) for spec in _specs(target, wish)]
    return Job(target, tokenizer, sets, response_limit(target.files, sets, wish.max_tokens, longest))


def _specs(target: Target, wish: Wish) -> list[EvalSet]:
    if wish.sets:
        return [_like_the_run(resolve(one), one, target) for one in wish.sets]
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
        instruct=False,
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


def _evaluate(job: Job, wish: Wish) -> list[dict[str, Any]]:
    target = job.target
    out.print(f"[bold]{escape(target.label)}[/bold]: {escape(str(target.weights))} -> {escape(str(target.out))}")
    for one in job.sets:
        rules = ", ".join(sorted(set(one.rules.values())))
        out.print(f"  {one.spec.title}: {len(one.prompts)} problems of {escape(one.origin)}, graded by {escape(rules)}")
    with _bars() as bars:

        def watch(prepared: PreparedSet) -> Any:
            bar = bars.add_task(prepared.spec.title, total=None, right="")

            def told(done: int, total: int, right: int) -> None:
                bars.update(bar, completed=done, total=total, right=f"{right / done:.1%} right")

            return told

        return evaluate_weights(
            target.weights,
            partial(as_hf, target.weights, target.out / "hf"),
            target.config,
            job.sets,
            job.tokenizer,
            job.max_tokens,
            wish.seed,
            target.out,
            wish.fresh,
            watch,
        )


@contextmanager
def _bars() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn("{task.fields[right]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        yield bars


def _table_folder(targets: Sequence[Target], folder: Path | None) -> Path:
    if folder is not None:
        return folder
    return targets[0].out if len(targets) == 1 else targets[0].config.runs_dir / "eval"


def _show(scored: Sequence[Scored], folder: Path, json_file: Path | None) -> None:
    tables = score_tables(scored)
    console = wide()
    for table in (*(one.rich() for one in tables), details(scored)):
        console.print()
        console.print(table)
    from owpo_megatron.report.score_plot import write_score_figure

    figure = write_score_figure(folder / "scores.png", scored)
    for file in (folder / "table.json", json_file):
        if file is not None:
            write_tables(file, tables, scored)
    out.print(f"\nwritten: {escape(str(folder / 'table.json'))}, {escape(str(figure))}; problem by problem: SET.jsonl")
