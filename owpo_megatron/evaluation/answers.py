"""Answers of an evaluation's responses, in one spelling each: what the entropy of answers is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from owpo_megatron.data import Tokenizer
from owpo_megatron.verifiers.extraction import final_answer
from owpo_megatron.verifiers.surface import clean, string_form


def with_answers(lines: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The lines of an evaluation with `answers`, one per response; a response without an answer is its own.

    Args:
        lines: as evaluations write them, with `responses`; others stay as they are.
    """
    return [
        {**line, "answers": [answer_of(tokenizer.decode(ids)) for ids in line["responses"]]}
        if "responses" in line
        else dict(line)
        for line in lines
    ]


def answer_of(response: str) -> str:
    r"""The final answer of a response in one spelling; the response itself where it has none.

    Example:
        >>> answer_of(r"so \boxed{\dfrac12}") == answer_of(r"It is \boxed{\frac{1}{2}}."), answer_of(" x0k12 ")
        (True, 'x0k12')
    """
    answer = final_answer(response)
    return response.strip() if answer is None else string_form(clean(answer))
