"""The rule for mathematics: extract the final answer, compare strings, then expressions (math-verify)."""

from __future__ import annotations

import logging
import re

from math_verify import parse, verify

from owpo_megatron.types import GradingItem, VerdictReason
from owpo_megatron.verifiers.extraction import final_answer

# It warns, once a process, that its own timeouts are off; the pool's deadline is on.
for _module in ("math_verify.parser", "math_verify.grader"):
    logging.getLogger(_module).setLevel(logging.ERROR)

MAX_ANSWER_CHARACTERS = 500
_INTEGER = re.compile(r"[+-]?[0-9]+", re.ASCII)
_WRAPPERS = re.compile(r"\\(?:text|mathrm|mathbf|boxed)\{([^{}]*)\}")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?:[^0-9]|$))")
_DECORATION = str.maketrans("", "", "$ ")


def grade_math(item: GradingItem) -> VerdictReason:
    """`ok` if the final answer equals the gold answer as a string or as an expression.

    A truncated response counts like any other: what it says last is judged. May take long or much memory on a hostile
    answer (its own timeouts are off, because the pool kills), so run it in a worker.
    """
    answer = final_answer(item.response)
    if answer is None:
        return "no_answer"
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return "too_long"
    given, gold = normalise(answer), normalise(item.answer)
    if given == gold:
        return "ok"
    if _INTEGER.fullmatch(given) and _INTEGER.fullmatch(gold):
        return "ok" if int(given) == int(gold) else "wrong"
    parsed = _expressions(answer)
    if not parsed:
        return "parse_failed"
    return "ok" if verify(_expressions(item.answer), parsed, timeout_seconds=None) else "wrong"


def normalise(answer: str) -> str:
    r"""Strip what carries no meaning in a short answer: spaces, $, \text, thousands commas, a final dot, emphasis.

    In the manner of DAPO's string rule, without the parts of it that call different answers equal.

    Example:
        >>> normalise(r"**$1{,}234$.**"), normalise(r"\text{(A)}")
        ('1234', '(A)')
    """
    text = answer.strip().strip("*").strip().removesuffix(".")
    text = text.replace("\\!", "").replace("\\,", "").replace("{,}", ",").replace("\\left", "").replace("\\right", "")
    text = _WRAPPERS.sub(r"\1", text).translate(_DECORATION)
    return _THOUSANDS.sub("", text).removesuffix(".")


def _expressions(answer: str) -> list[object]:
    """math-verify's reading of one answer; in a box, so that all of it counts and not a number somewhere in it."""
    return parse(f"\\boxed{{{answer.strip().strip('$')}}}", parsing_timeout=None)  # type: ignore[arg-type]
