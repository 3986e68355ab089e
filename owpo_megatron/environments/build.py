"""The environments of a configuration: looked at before anything starts, then put over the run's engine."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable
from typing import Any

from owpo_megatron.config import Config
from owpo_megatron.data import PromptTemplate, Tokenizer
from owpo_megatron.environments.engine import EpisodeEngine
from owpo_megatron.environments.pool import EnvironmentPool
from owpo_megatron.environments.turns import TurnTemplate
from owpo_megatron.errors import UserError


class EnvironmentBuilder:
    """Starts the environments' processes, whose imports go on while engines start.

    Args:
        say: called once where the template rewrites earlier turns.
        stack: what has to be closed is entered here.

    Raises:
        UserError: there is no such environment, or what the chat template puts between turns depends on earlier ones.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        date: datetime.date | None,
        say: Callable[[str], None],
        stack: contextlib.ExitStack,
    ):
        assert config.environment is not None
        self._wants, self._decode = config.environment, tokenizer.decode
        template = PromptTemplate.of(config.data, tokenizer, date)
        self._turns = TurnTemplate(template, self._wants, config.data.max_prompt_tokens, say)
        self._pool = EnvironmentPool(self._wants)
        stack.callback(self._pool.close)

    def over(self, engine: Any) -> EpisodeEngine:
        """An engine whose responses are episodes.

        Raises:
            UserError: the engine cannot converse.
        """
        if not hasattr(engine, "converse"):
            remedy = "episodes need an engine with `converse` (owpo_megatron/types/seams.py), as Fleet has it"
            raise UserError("environment.name", self._wants.name, remedy)
        return EpisodeEngine(engine, self._pool, self._turns, self._wants, self._decode)
