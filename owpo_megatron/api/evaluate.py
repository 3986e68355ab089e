"""Evaluation of weights on disk, as a function: model folders, runs and their checkpoints, served by SGLang."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owpo_megatron.api.evaluation_jobs import Wish, prepared_jobs
from owpo_megatron.api.result import RunResult
from owpo_megatron.config import SetConfig
from owpo_megatron.evaluation.draw import DrawProgress
from owpo_megatron.evaluation.prepare import PreparedSet
from owpo_megatron.run.layout import RunFolder

if TYPE_CHECKING:
    import pandas


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
    chain: str | None = None,
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
        chain: rule that judges the reasoning of right responses ("judge:FILE.yaml", ...), for cot_pass@k.

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
        chain,
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
    printed = -1

    def watch(done: int, total: int, right: int) -> None:
        nonlocal printed
        if (tenth := 10 * done // total) > printed:
            printed = tenth
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
