"""The engine's context length, as SGLang derives it, against the longest sequence that a run asks for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from owpo_megatron.config import Config, hf_folder
from owpo_megatron.errors import UserError

_KEYS = ("max_sequence_length", "seq_length", "max_seq_len", "model_max_length", "max_position_embeddings")


def context_length(files: Path, sglang: Mapping[str, Any]) -> int | None:
    """Tokens that a request may hold, prompt and response together; None if config.json has none of its names.

    Args:
        files: HF folder with config.json.
        sglang: the configuration's `sglang` block; its `context_length` has the last word, as for the server.
    """
    for name in ("context_length", "context-length"):
        if sglang.get(name) is not None:
            return int(sglang[name])
    raw = json.loads((files / "config.json").read_text())
    found = next((raw[key] for key in _KEYS if raw.get(key)), None)
    if found is None:
        return None
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    longer = scaling.get("factor") or 1
    if "original_max_position_embeddings" in scaling or scaling.get("rope_type") == "llama3":
        longer = 1  # the number above is that of the scaled model already
    return int(longer * found)


def check_context_length(config: Config, longest_prompt: int | None = None) -> None:
    """Refuse responses that the engine would refuse, before it starts.

    Args:
        longest_prompt: tokens of the longest prompt; None before prompts are read, when only what can never work is
            refused.

    Raises:
        UserError: a prompt and rollout.max_response_tokens do not fit into the model's context.
    """
    context = context_length(hf_folder(config.model.path), config.sglang)
    response = config.rollout.max_response_tokens
    if context is None or (longest_prompt or 1) + response <= context:
        return
    prompt = longest_prompt or min(config.data.max_prompt_tokens, context // 2)
    whose = f"the longest prompt ({prompt} tokens)" if longest_prompt else "prompts"
    if prompt >= context:
        raise UserError("data.max_prompt_tokens", config.data.max_prompt_tokens, _too_long(prompt, context))
    raise UserError(
        "rollout.max_response_tokens",
        response,
        f"{whose} and the response must fit into the model's context of {context} tokens; set it to at most "
        f"{context - prompt}, or lower data.max_prompt_tokens = {config.data.max_prompt_tokens}",
    )


def _too_long(prompt: int, context: int) -> str:
    return f"a prompt of {prompt} tokens leaves no room in the model's context of {context}; lower it"
