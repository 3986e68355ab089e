"""Part of `owpo serve --record`: the endpoint for agents, in front of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from owpo_megatron.config import Config, EnvironmentConfig
from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.types import Rollout, SampleRequest, Sampling

if TYPE_CHECKING:
    from owpo_megatron.engine import EngineClient
    from owpo_megatron.environments.endpoint import ChatEndpoint

MAX_TURNS = 100  # of a session, where no configuration has `environment`


def record_sessions(
    settings: Config, files: Path, client: EngineClient, folder: Path, host: str, port: int, chats: bool
) -> ChatEndpoint:
    """Listen for agents, and keep their sessions in the folder.

    Args:
        files: the model's HF folder.
        chats: take the tokenizer's chat template, where it has one, in place of `data.template`.

    Raises:
        UserError: the port is taken, or the template cannot put turns together.
    """
    from owpo_megatron.data import PromptTemplate, load_tokenizer
    from owpo_megatron.engine import rollouts_path, save_rollouts
    from owpo_megatron.engine.context import context_length
    from owpo_megatron.environments.chat import ChatError
    from owpo_megatron.environments.endpoint import ChatEndpoint
    from owpo_megatron.environments.sessions import ROLLOUTS, SessionRecorder
    from owpo_megatron.environments.turns import TurnTemplate

    tokenizer = load_tokenizer(files)
    data, rollout = settings.data, settings.rollout
    name = "chat" if chats and tokenizer.has_chat_template else data.template
    template = PromptTemplate(name, tokenizer, data.template_args, data.date)
    limits = settings.environment or EnvironmentConfig(name="agent", max_turns=MAX_TURNS)
    stop_ids, stop = tuple(tokenizer.eos_ids), tuple(rollout.stop)
    sampling = Sampling(rollout.max_response_tokens, rollout.temperature, stop_token_ids=stop_ids, stop=stop)
    rollouts = folder / ROLLOUTS
    rollouts.mkdir(parents=True, exist_ok=True)

    context = context_length(files, settings.sglang)

    def draw(request: SampleRequest, sampling: Sampling) -> Rollout:
        room = sampling.max_tokens if context is None else context - len(request.prompt.token_ids)
        if room <= 0:
            raise ChatError(400, f"the conversation fills the model's context of {context} tokens")
        within = replace(sampling, max_tokens=min(sampling.max_tokens, room))
        try:
            (reply,) = client.generate([replace(request, sampling=within)], within)
        except EngineError as error:
            raise ChatError(503, f"the engine failed: {error}") from error
        return reply

    def save(number: int, sessions: Sequence[Rollout]) -> None:
        save_rollouts(rollouts_path(rollouts, number), sessions)

    turns = TurnTemplate(template, limits, data.max_prompt_tokens)
    recorded = sum(1 for _ in rollouts.glob("*.jsonl"))
    recorder = SessionRecorder(draw, save, folder, turns, limits, sampling, tokenizer.decode, recorded)
    try:
        return ChatEndpoint(recorder.answer, files.name, host, port)
    except OSError as error:
        raise UserError("--record-port", port, f"cannot listen there ({error}); give another, or 0") from error
