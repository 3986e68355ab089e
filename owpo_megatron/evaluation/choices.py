"""Multiple-choice questions: the records of GPQA and MMLU-Pro, with lettered options in a seeded order.

GPQA: `Question`, `Correct Answer`, `Incorrect Answer 1` to `3`. MMLU-Pro: `question` (or `problem`), `options`,
`answer_index` (or the letter `answer`), an id in `question_id` or `id`; options equal to "N/A" are padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from owpo_megatron.data import Problem
from owpo_megatron.errors import UserError

DOMAIN = "multiple_choice"  # domain of these problems, and the name of their verifier rule
LETTERS = "ABCDEFGHIJ"
_GPQA = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_PADDING = "N/A"


@dataclass(frozen=True)
class Choice:
    """A question with its options in the order of its record.

    Example:
        Choice("7", "How many sides has a square?", ("3", "4", "5"), right=1)
    """

    id: str
    question: str
    options: tuple[str, ...]
    right: int  # index into options


def is_choice(record: Mapping[str, Any]) -> bool:
    """Whether a record asks a multiple-choice question."""
    return "options" in record or _GPQA[1] in record


def choice_of(record: Mapping[str, Any], place: str) -> Choice:
    """Parse the question of a record.

    The id of a GPQA question is a hash of its text, since no part of it may be stored in the clear.

    Raises:
        UserError: the record lacks a field, or has equal options or more than ten; the message names `place`, not the
            record's content.
    """
    if _GPQA[1] in record:
        question, *options = (_text(record, name, place) for name in _GPQA)
        choice = Choice(hashlib.sha256(question.encode()).hexdigest()[:16], question, tuple(options), right=0)
    else:
        choice = _mmlu_pro(record, place)
    if len(set(choice.options)) < len(choice.options) or not 2 <= len(choice.options) <= len(LETTERS):
        raise UserError(place, f"{len(choice.options)} options", f"must be 2 to {len(LETTERS)}, all different")
    return choice


def option_order(seed: int, question_id: str, count: int) -> list[int]:
    """Return the order of a question's options: a pure function of its arguments, every order equally likely.

    Options are sorted by a hash, so that the order is the same on every machine and with every version of Python.

    Example:
        >>> sorted(option_order(1, "7", 4))
        [0, 1, 2, 3]
    """

    def key(option: int) -> bytes:
        return hashlib.blake2b(f"{seed}/{option}/{question_id}".encode(), digest_size=16).digest()

    return sorted(range(count), key=key)


def as_problem(choice: Choice, seed: int) -> Problem:
    """Build a problem with lettered options in seeded order; its answer is the letter of the right option."""
    order = option_order(seed, choice.id, len(choice.options))
    options = "\n".join(f"({letter}) {choice.options[index]}" for letter, index in zip(LETTERS, order, strict=False))
    text = f"{choice.question}\n\n{options}\n\nThe final answer is the letter of the right option."
    return Problem(choice.id, text, LETTERS[order.index(choice.right)], DOMAIN)


def _mmlu_pro(record: Mapping[str, Any], place: str) -> Choice:
    question = _text(record, "question" if "question" in record else "problem", place)
    options = record["options"]
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise UserError(f"{place} options", type(options).__name__, "must be a list of texts")
    for option in options:
        _check_encodable(option, f"{place} options")
    kept = [index for index, option in enumerate(options) if option.strip() != _PADDING]
    right = record.get("answer_index")
    if right is None:
        letter = _text(record, "answer", place)
        right = LETTERS.find(letter) if len(letter) == 1 else -1
    if right not in kept:
        raise UserError(f"{place} answer", right, "must be the index or the letter of one of its options")
    name = record.get("question_id", record.get("id"))
    if name is None:
        name = hashlib.sha256(question.encode()).hexdigest()[:16]
    return Choice(str(name), question, tuple(options[index].strip() for index in kept), kept.index(right))


def _text(record: Mapping[str, Any], name: str, place: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place} {name}", type(value).__name__, "must be a non-empty text")
    _check_encodable(value, f"{place} {name}")
    # GPQA's sources leave this mark in place of a title.
    return value.strip().replace(" [title]", ". ").replace("  ", " ")


def _check_encodable(text: str, place: str) -> None:
    """Raise UserError for half of a surrogate pair, which no tokenizer reads; the text itself is not shown."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X}"
        remedy = f"character {error.start + 1} is half of a surrogate pair; replace it or remove the row"
        raise UserError(place, code, remedy) from error
