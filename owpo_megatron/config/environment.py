"""The section `environment:`: turns between the policy and something that answers it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from owpo_megatron.config.file import Section

ENVIRONMENTS = ("agent", "calculator", "lookup", "python", "search", "verifiers")
"""Those of environments/ by name."""


def _known_environment(name: str) -> str:
    if name in ENVIRONMENTS or re.fullmatch(r"python:[\w.]+:\w+|https?://\S+", name):
        return name
    known = ", ".join(ENVIRONMENTS)
    raise ValueError(f"use one of {known}, python:MODULE:CLASS, or the URL of an environment")


class EnvironmentConfig(Section):
    name: Annotated[str, AfterValidator(_known_environment)]
    """`calculator`, `python` (programs in the sandbox), `search` (over a local JSONL), `lookup`; `agent` (a loop that
    uses the OpenAI chat protocol); your own class as `python:MODULE:CLASS`; or the URL of one that runs elsewhere."""
    args: dict[str, Any] = {}
    """Arguments of the environment, e.g. {documents: corpus.jsonl} for `search`."""
    max_turns: int = Field(8, gt=0)
    """Turns of the policy in an episode."""
    max_turn_tokens: int | None = Field(None, gt=0)
    """Tokens of one turn; null: what is left of `rollout.max_response_tokens`, which all turns and observations share.
    """
    max_observation_tokens: int = Field(1024, gt=0)
    """Tokens of one observation; the middle of a longer one is left out."""
    max_seconds: float | None = Field(None, gt=0)
    """Seconds of an episode, after which no further turn begins; null: no limit. A run in which it strikes does not
    repeat bit for bit."""
    role: Literal["user", "tool"] = "user"
    """Role of an observation in the chat template."""
    workers: int = Field(2, gt=0)
    """Processes that the environments run in."""
    timeout: float = Field(10.0, gt=0)
    """Seconds of one step of an environment; then its process is killed and its episode ends."""
    memory_gb: float = Field(2.0, gt=0)
    """Largest address space of such a process, in GB."""
