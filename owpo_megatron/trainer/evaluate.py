"""Evaluation of the weights under training: the sets of the run, through the run's own engine and verifier."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from owpo_megatron.config import DataConfig, EvalConfig
from owpo_megatron.data import PromptTemplate, Tokenizer, load_prompts
from owpo_megatron.evaluation.draw import Answering, evaluate_set
from owpo_megatron.evaluation.prepare import PreparedSet, held_out, prepare
from owpo_megatron.evaluation.results import Results
from owpo_megatron.evaluation.sets import HELD_OUT, data_folder, sets_of_run, source_of
from owpo_megatron.types import Progress


def prepare_sets(
    config: EvalConfig,
    data: DataConfig,
    rule: str,
    seed: int,
    tokenizer: Tokenizer,
    date: datetime.date,
    say: Callable[[str], None],
) -> list[PreparedSet]:
    """The sets that a run evaluates itself on, the one that decides first.

    Args:
        rule: the verifier's, for the held-out problems.
        seed: seed for shuffling answer options.
        date: date that chat templates print as today.

    Raises:
        UserError: a set is not known, not found or faulty.
    """
    folder, prepared = data_folder(config.data_dir), []
    template = PromptTemplate.of(data, tokenizer, date)
    for spec in sets_of_run(config, rule):
        if spec.name == HELD_OUT and spec.source is None:
            prompts, report = load_prompts(data, tokenizer, "test", spec.limit, date)
            prepared.append(held_out(spec, prompts, report.source))
            say(f"held out: {report}")
        else:
            one = prepare(spec, source_of(spec, folder), template, seed)
            prepared.append(one)
            say(one.complaint or f"{spec.title}: {len(one.prompts)} problems of {one.origin}")
    return prepared


class Evaluator:
    """Draws and grades the samples of every set; keeps the results problem by problem in the run's eval/ folder.

    The same problems with the same seeds each time, so that two evaluations differ by the policy only.

    Args:
        sets: the first one's scores stand for the evaluation.
    """

    def __init__(
        self, sets: Sequence[PreparedSet], answering: Answering, out_dir: Path, progress: Progress | None = None
    ):
        self._sets = sets
        self._answering = answering
        self._out_dir = out_dir
        self._progress = progress

    def run(self, name: str) -> dict[str, Any]:
        """{"pass@1": ..., "problems": n, "samples": k, "response_length": mean} of the first set; where sets are named,
        "sets" has the same of each. Details and intervals: eval/NAME.jsonl and NAME.json, NAME_SET... of a named set.
        """
        scores = {one.spec.name: self._evaluate(one, name) for one in self._sets}
        first = next(iter(scores.values()))
        return first if list(scores) == [HELD_OUT] else first | {"sets": scores}

    def _evaluate(self, prepared: PreparedSet, name: str) -> dict[str, Any]:
        spec = prepared.spec
        file_name = name if spec.name == HELD_OUT else f"{name}_{spec.name}"
        # A run that resumes may have other weights at this step than the one that was interrupted: begun anew.
        results = Results(self._out_dir, file_name, {"step": name}, not spec.confidential, fresh=True)

        def watch(done: int, total: int, right: int) -> None:
            if self._progress is not None:
                self._progress(done, total)

        scores = evaluate_set(prepared, self._answering, results, watch)
        values = {metric: found["value"] for metric, found in scores["metrics"].items()}
        return values | {field: scores[field] for field in ("problems", "samples", "response_length")}
