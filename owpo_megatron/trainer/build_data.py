"""Problems of a run: training prompts and evaluation sets, tokenised and checked against the context length."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from owpo_megatron.config import Config
from owpo_megatron.data import Tokenizer, load_prompts, load_tokenizer, notes_on
from owpo_megatron.engine.context import check_context_length
from owpo_megatron.evaluation.prepare import PreparedSet
from owpo_megatron.trainer.evaluate import prepare_sets
from owpo_megatron.types import Prompt


@dataclass(frozen=True)
class RunData:
    """Problems that a run trains and is evaluated on. Empty, without a tokenizer, off global rank 0."""

    date: datetime.date  # what templates print as today
    tokenizer: Tokenizer | None = None
    prompts: tuple[Prompt, ...] = ()
    sets: tuple[PreparedSet, ...] = ()

    @property
    def domains(self) -> set[str]:
        """Domains of the training prompts."""
        return {prompt.domain for prompt in self.prompts}


def load_run_data(
    config: Config, model_files: Path, date: datetime.date, evaluation_only: bool, say: Callable[[str], None]
) -> RunData:
    """Read a run's problems and report what was found.

    Args:
        model_files: folder with the tokenizer.
        evaluation_only: sets are needed even where the run itself would not evaluate.

    Raises:
        UserError: a file or a row is not usable, or a prompt and its response exceed the engine's context.
    """
    tokenizer = load_tokenizer(model_files)
    tokenizer.check_stop(config.rollout.stop)
    train, report = load_prompts(config.data, tokenizer, date=date)
    say(str(report))
    for note in notes_on(train, config):
        say(note)
    wants, sets = config.eval, []
    if wants.before or wants.after or wants.every or evaluation_only:
        sets = prepare_sets(wants, config.data, config.verifier.rule, config.seed, tokenizer, date, say)
    if config.rollout.replay is None:
        asked = [*train, *(prompt for one in sets for prompt in one.prompts)]
        check_context_length(config, max(len(prompt.token_ids) for prompt in asked))
    return RunData(date, tokenizer, tuple(train), tuple(sets))
