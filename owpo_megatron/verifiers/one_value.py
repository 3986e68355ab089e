"""Rules whose answer is one number or one letter: GSM8K (Cobbe et al. 2021) and multiple choice (GPQA, MMLU-Pro).

GSM8K's answer is a number after `####`, or in the final answer, compared by value. A multiple-choice answer also has
MMLU-Pro's own form, `the answer is (B)`; a response that names several letters names none.
"""

from __future__ import annotations

import re
from fractions import Fraction

from owpo_megatron.types import GradingItem, VerdictReason
from owpo_megatron.verifiers.extraction import final_answer
from owpo_megatron.verifiers.opening import conclusion, opening_of
from owpo_megatron.verifiers.surface import clean

_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,40}(?:\.[0-9]{1,40})?|\.[0-9]{1,40})(?:/[0-9]{1,40})?", re.ASCII)
_WORDS = re.compile(r"\\text\s*\{[^{}0-9]*\}|\\[,!; ]|[$€£%*,]|\\|(?<=[0-9 ])(?![xyz]$)[A-Za-z. ]+$")
_WRAPPER = re.compile(r"\\(?:text[a-z]*|math[a-z]+|mbox)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"(?:option|choice)?\s*[(\[{]?\s*([A-Za-z])\s*[)\]}]?(?=\s*$|\s*[.:,)]|\s+[^\s])", re.IGNORECASE)
_OTHERS = re.compile(
    r"(?:\b(?:or|and)\b(?:\s+(?:maybe|perhaps|possibly))?|[,/;&|])\s*(?:option|choice)?\s*[(\[]?\s*([A-J])\b(?!')"
    r"|^\s*[)\]}]?\s+[(\[]?[A-J][)\]]?\s*$"
)
_CHOSEN = re.compile(r"\b(?:correct|right|best)\s+(?:option|choice)\s*(?:is|:)\s*([^\n]{1,60})", re.IGNORECASE)
_DENIAL = re.compile(r"\b(?:not|isn't|neither|none)\b", re.IGNORECASE)


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


def grade_multiple_choice(item: GradingItem) -> VerdictReason:
    """`ok` if the final answer names the gold letter and no other."""
    answer = final_answer(item.response, item.prompt)
    concluded = conclusion(item.response, opening_of(item.prompt)).strip()
    if answer is None and 0 < len(concluded) <= 4:
        answer = concluded
    if answer is None and (chosen := _CHOSEN.findall(concluded)):
        answer = chosen[-1]
    if answer is None:
        return "no_answer"
    given, gold = letter_of(answer), letter_of(item.answer)
    if given is None:
        return "parse_failed"
    return "ok" if given == gold else "wrong"


def letter_of(text: str) -> str | None:
    """The one option that an answer names, None if it names none or several."""
    text = _WRAPPER.sub(r"\1", clean(text[:500])).replace("\\ ", " ").strip().strip("*$ ")
    match = _LETTER.match(text)
    if match is None or _DENIAL.search(text) or _OTHERS.search(text[match.end() :]):
        return None
    bare = match.end() == len(text)
    if not bare and text[0] not in "([{" and not text[match.end(1) : match.end(1) + 1].strip(" "):
        return None if match.group(1).islower() or match.group(1) in "AI" else match.group(1)
    return match.group(1).upper()
