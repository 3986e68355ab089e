"""GSM8K's rule: one number after `####`, or in the final answer, compared by value (Cobbe et al. 2021)."""

from __future__ import annotations

import re
from fractions import Fraction

from owpo_megatron.types import GradingItem, VerdictReason
from owpo_megatron.verifiers.extraction import final_answer
from owpo_megatron.verifiers.opening import conclusion, opening_of
from owpo_megatron.verifiers.surface import clean

_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,40}(?:\.[0-9]{1,40})?|\.[0-9]{1,40})(?:/[0-9]{1,40})?", re.ASCII)
_WORDS = re.compile(r"\\text\s*\{[^{}0-9]*\}|\\[,!; ]|[$€£%*,]|\\|(?<=[0-9 ])[A-Za-z. ]+$")


def grade_gsm8k(item: GradingItem) -> VerdictReason:
    """`ok` if the number of the last `####` line, or else of the final answer, is the gold number."""
    lines = _HASHES.findall(conclusion(item.response, opening_of(item.prompt)))
    answer = lines[-1] if lines else final_answer(item.response, item.prompt)
    if answer is None or not answer.strip():
        return "no_answer"
    if len(answer) > 200:
        return "too_long"
    given, gold = number_of(answer), number_of(item.answer.rpartition("####")[2])
    if given is None:
        return "parse_failed"
    return "ok" if given == gold else "wrong"


def number_of(text: str) -> Fraction | None:
    """The one number of a final answer, None if it is anything else."""
    cleaned = clean(text).rpartition("=")[2].replace("{,}", "").strip()
    match = _NUMBER.fullmatch(_WORDS.sub("", cleaned).strip().rstrip("."))
    if match is None or re.search(r"/0+$", match.group()):
        return None
    return Fraction(match.group()) if "." not in match.group() or "/" not in match.group() else None
