"""Evaluation of weights on disk, as a function: model folders, runs and their checkpoints, served by SGLang."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owpo_megatron.api.exporting import as_hf
from owpo_megatron.api.result import RunResult
from owpo_megatron.config import Config, DataConfig, SetConfig, hf_folder
from owpo_megatron.config.file import apply_override, read_mapping
from owpo_megatron.data import PromptTemplate, Tokenizer, load_prompts, load_tokenizer
from owpo_megatron.data.tokenizer import check_tokenizer_files
from owpo_megatron.errors import UserError
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

if TYPE_CHECKING:
    import pandas

TEMPLATES = ("auto", "chat", "completion", "raw")


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of models and checkpoints on evaluation sets.

    Args:
        scores: one mapping per target and set, as in OUT/SET.json, with `model`, `method` and `checkpoint` in front.
    """

    scores: tuple[Mapping[str, Any], ...]

    @property
    def table(self) -> pandas.DataFrame:
        """A row per target, set and metric: model, method, checkpoint, set, metric, value, low, high, problems, ...

        `low` and `high` bound the 95 % interval over problems.
        """
        import pandas

        return pandas.DataFrame(
            {
                **{name: one[name] for name in ("model", "method", "checkpoint", "set")},
                "metric": metric,
                **found,
                **{name: one[name] for name in ("problems", "samples", "response_length", "truncated_share")},
            }
            for one in self.scores
            for metric, found in one["metrics"].items()
        )

    def __getitem__(self, metric: str) -> float:
        """A metric of the only target's first set, e.g. result["pass@1"]."""
        return float(self.scores[0]["metrics"][metric]["value"])

    def __repr__(self) -> str:
        return f"EvaluationResult(\n{self.table.to_string(index=False)}\n)"

    def _repr_html_(self) -> str:
        return self.table.to_html(index=False, float_format="{:.4f}".format)


def evaluate(
    model_or_run: RunResult | Path | str,
    sets: str | Sequence[str | Mapping[str, Any] | SetConfig] = (),
    overrides: Sequence[str] = (),
    *,
    checkpoints: Sequence[str | int] = (),
    samples: int | None = None,
    limit: int | None = None,
    data: Path | str | None = None,
    max_tokens: int | None = None,
    template: str = "auto",
    seed: int = 0,
    out: Path | str | None = None,
    fresh: bool = False,
) -> EvaluationResult:
    """Evaluate a model, or checkpoints of a run: SGLang serves the weights; what `owpo eval` does, and its results.

    Interrupted, the same call goes on where it stopped; finished results are not drawn again.

    Args:
        model_or_run: an HF folder, a converted folder, a run's folder or its RunResult.
        sets: names of known sets ("aime24" or ["aime24", "amc"]), or mappings {"name": ..., "source": FILE}; empty: the
            run's own.
        overrides: changes of the run's configuration, e.g. ["engine.tp=4"].
        checkpoints: "best", "newest" or a step of a run; default: the best, where it is kept, and the newest.
        samples: per problem; None: the set's own number.
        limit: the first problems of each set only.
        data: folder with the files of known sets.
        max_tokens: longest response.
        template: chat, completion, raw or a .jinja file; "auto": the run's own, or chat where the tokenizer has it.
        seed: seeds the samples and the order of options.
        out: folder of the results; default RUN/eval/ or runs/eval/MODEL/.
        fresh: draw everything again.

    Raises:
        UserError: a mistake in any of them; nothing was started.
        EngineError: an engine does not start, or stays dead; what was drawn is kept.

    Example:
        evaluate("runs/quickstart", samples=32).table
        evaluate("models/Qwen3-8B", "aime24", samples=32)["pass@1"]
    """
    wish = Wish(
        tuple(_set_config(one, samples, limit) for one in ([sets] if isinstance(sets, str) else sets)),
        samples,
        limit,
        None if data is None else Path(data),
        max_tokens,
        template,
        seed,
        fresh,
    )
    path = model_or_run.run_dir if isinstance(model_or_run, RunResult) else Path(model_or_run)
    folder = None if out is None else Path(out)
    is_run = RunFolder(path).config.is_file()
    models, runs = ([], [path]) if is_run else ([path], [])
    jobs = prepared_jobs(models, runs, [str(one) for one in checkpoints], overrides, wish, folder)
    scores = []
    for job in jobs:
        for note in job.notes():
            print(note, file=sys.stderr)
        for one in job.run(wish, _printed, _announced):
            scores += [job.row(place) | one for place in job.target.checkpoints or ("",)]
    return EvaluationResult(tuple(scores))


def _printed(prepared: PreparedSet) -> DrawProgress:
    """Progress for a notebook or a script: a line per tenth."""
    told = -1

    def watch(done: int, total: int, right: int) -> None:
        nonlocal told
        if (tenth := 10 * done // total) > told:
            told = tenth
            print(f"{prepared.spec.title}: {done} of {total} samples, {right / done:.1%} right", flush=True)

    return watch


@contextmanager
def _announced(what: str) -> Iterator[None]:
    print(what, flush=True)
    yield


def _set_config(wanted: str | Mapping[str, Any] | SetConfig, samples: int | None, limit: int | None) -> SetConfig:
    if isinstance(wanted, SetConfig):
        return wanted
    fields = {"name": wanted} if isinstance(wanted, str) else dict(wanted)
    return SetConfig.model_validate({"samples": samples, "limit": limit} | fields)


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
    sets = [_set(spec, target, folder, made, own, wish.seed) for spec in _specs(target, wish)]
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
