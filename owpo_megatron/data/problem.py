"""A problem with a verifiable answer, before it becomes a `Prompt`, and when two problems are the same."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from owpo_megatron.verifiers.golds import gold_text
from owpo_megatron.verifiers.rational import number_key
from owpo_megatron.verifiers.surface import clean, string_form

Split = Literal["train", "test"]
_WORDS = re.compile(r"[a-z]+|[0-9]+|[^\W0-9a-z_]")  # a word, a number, or one letter of a script without spaces
_CJK = re.compile(r"[\u3400-\u9fff]")


@dataclass(frozen=True)
class Message:
    """A turn of a conversation; `continued`: the beginning of a reply, which the model goes on with."""

    role: str
    content: str
    continued: bool = False


@dataclass(frozen=True)
class Problem:
    """A problem of a source.

    Example:
        Problem(id="countdown/train/0", text="2,3,7=13:", answer="2,3,7=13", domain="countdown")
    """

    id: str
    text: str  # of a conversation: all of its turns
    answer: str  # what the verifier compares a response with
    domain: str  # routes to a verifier rule, and to a teacher
    messages: tuple[Message, ...] = ()  # a conversation that is more than one user's turn
    token_ids: tuple[int, ...] = ()  # a prompt that was tokenized before
    solutions: tuple[str, ...] = ()  # whole responses of experts; read only where a method asks for them
    hints: tuple[str, ...] = ()  # texts that help, the least helpful first; the same


# ------------------------------------------------------------------------------- readings of a text, strict to loose
def without_spaces(text: str) -> str:
    """Texts that differ in white space only are the same problem."""
    return "".join(text.split())


def letters_and_digits(text: str) -> str:
    """Texts that differ in punctuation or LaTeX's spelling of it ($x$ and \\(x\\)) are probably the same problem.

    Not always: it also equates x + 1 with x - 1, so nothing is left out for it unless asked.
    """
    return "".join(character for character in text.lower() if character.isalnum())


def words(text: str) -> list[str]:
    """Split a text into the words whose sequences are compared for contamination.

    Example:
        >>> words(r"Find $\\frac{12}{x}$.")
        ['find', 'frac', '12', 'x']
    """
    return _WORDS.findall(text.lower())


def is_chinese(text: str) -> bool:
    return _CJK.search(text) is not None


@lru_cache(maxsize=1 << 16)
def answer_key(answer: str) -> str:
    r"""The same for answers that are equal without a parser: other spellings, and exact values of numbers.

    Example:
        >>> answer_key("0.5") == answer_key(r"\frac{1}{2}") == answer_key(r"$\dfrac12$"), answer_key("1,000")
        (True, '1000')
    """
    return number_key(string_form(clean(gold_text(answer)))) or answer.strip()
