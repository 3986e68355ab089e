"""The environments of a run, and the engine whose responses are episodes with them. On global rank 0."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable

from owpo_megatron.config import Config
from owpo_megatron.data import PromptTemplate, Tokenizer
from owpo_megatron.engine import RecordedEngine
from owpo_megatron.environments import EnvironmentPool, EpisodeEngine, TurnTemplate
from owpo_megatron.errors import UserError
from owpo_megatron.types import RolloutEngine


def build_environment(
    config: Config,
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    date: datetime.date,
    say: Callable[[str], None],
    stack: contextlib.ExitStack,
) -> RolloutEngine:
    """An engine that draws episodes; a replay's has them already.

    Args:
        stack: what has to be closed is entered here.

    Raises:
        UserError: there is no such environment, the chat template does not take turns, or the engine cannot converse.
    """
    wants = config.environment
    assert wants is not None
    if isinstance(engine, RecordedEngine):
        return engine
    if not hasattr(engine, "converse"):
        remedy = "episodes need an engine with `converse` (owpo_megatron.types.seams), as Fleet has it"
        raise UserError("environment.name", wants.name, remedy)
    template = PromptTemplate.of(config.data, tokenizer, date)
    turns = TurnTemplate(template, wants.role, wants.max_observation_tokens, say)
    pool = EnvironmentPool(wants)
    stack.callback(pool.close)
    return EpisodeEngine(engine, pool, turns, wants, tokenizer.decode)
