"""The rule for mathematics: extract the final answer, compare strings, then expressions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from owpo_megatron.types import GradingItem, VerdictReason
from owpo_megatron.verifiers.extraction import closing_value, final_answer
from owpo_megatron.verifiers.golds import gold_text
from owpo_megatron.verifiers.piecewise import undecided
from owpo_megatron.verifiers.rational import compare
from owpo_megatron.verifiers.surface import clean, string_form

MAX_ANSWER = 20_000  # characters that are looked at; no answer is that long
_SEPARATOR_WORDS = re.compile(r"\\q?quad(?![a-z])|\\land(?![a-z])|\\wedge(?![a-z])|(?<![A-Za-z])(?:and|or)(?![A-Za-z])")
_SEPARATOR_TEXT = re.compile(r"\\text\s*\{\s*(?:and|or)\s*\}")
_WARM_UP = ((r"\frac{1}{2}", "0.5"), ("x^{2}+2x+1", "(x+1)^2"), ("[0,1)", "(0,1)"), (r"\sqrt{2}", "y=2"))
_SEPARATORS = re.compile(r"[,;\s]+")


@dataclass(frozen=True)
class MathRule:
    """`ok` if the final answer equals the gold answer as a string or as an expression.

    A truncated response is judged like any other, by its last answer. The full rule may take long or much memory on a
    hostile answer, so run it in a worker; `quick` is linear in the response and safe in any process.

    Args:
        strict: variables have names that matter; False: `f(x)` equals `f(y)`.
    """

    strict: bool = True

    def quick(self, item: GradingItem) -> VerdictReason | None:
        """The verdict where strings and plain numbers decide it, else None."""
        answer = _answer(item)
        if answer is None:
            return "no_answer"
        return _by_strings(answer, item.answer)

    def warm(self) -> None:
        """Import sympy and go through the parser once, so that the first items do not pay for it."""
        from owpo_megatron.verifiers.equivalence import equivalent

        for answer, gold in _WARM_UP:
            equivalent(answer, gold)

    def __call__(self, item: GradingItem) -> VerdictReason:
        from owpo_megatron.verifiers.equivalence import equivalent, found_in_text

        answer = _answer(item)
        if answer is None:
            return "no_answer"

        def judge(text: str) -> VerdictReason:
            derived = item.form == "answer"
            return _by_strings(text, item.answer) or equivalent(
                text, clean(gold_text(item.answer)), derived, self.strict
            )

        verdict = judge(answer)
        if verdict == "parse_failed":
            later = closing_value(item.response, item.prompt)
            if later is not None:
                return judge(clean(later))
        if verdict != "ok" and item.form == "answer" and r"\boxed" not in item.response:
            return "ok" if found_in_text(item.response, item.answer) else verdict
        return verdict


grade_math = MathRule()


def _answer(item: GradingItem) -> str | None:
    answer = final_answer(item.response, item.prompt)
    if answer is None and item.form == "answer":
        answer = item.response
    return None if answer is None else clean(answer[: MAX_ANSWER + 1]) or None


def _by_strings(answer: str, gold: str) -> VerdictReason | None:
    cleaned, theirs, their_list = _gold_forms(gold)
    if not theirs:
        return "wrong"  # nothing equals an answer that is not there
    if len(answer) > MAX_ANSWER:
        return "too_long"
    ours = string_form(answer)
    if (
        ours == theirs
        or answer == cleaned
        or (_separated(answer) == their_list and undecided(answer) == undecided(cleaned))
    ):
        return "ok"
    same = compare(ours, theirs)
    return None if same is None else "ok" if same else "wrong"


@lru_cache(maxsize=4096)
def _gold_forms(gold: str) -> tuple[str, str, str]:
    cleaned = clean(gold_text(gold))
    return cleaned, string_form(cleaned), _separated(cleaned)


def _separated(cleaned: str) -> str:
    """A string form with one spelling of the separators of a list."""
    plain = _SEPARATOR_TEXT.sub(";", cleaned)
    return _SEPARATORS.sub(",", string_form(_SEPARATOR_WORDS.sub(";", plain)))
