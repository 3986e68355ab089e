"""A problem with a verifiable answer, before a template and a tokenizer make a `Prompt` of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Problem:
    """What a source yields.

    Example:
        Problem(id="countdown/train/0", text="2,3,7=13:", answer="2,3,7=13", domain="countdown")
    """

    id: str
    text: str
    answer: str  # what the verifier compares a response with
    domain: str  # routes to a verifier rule, and to a teacher
