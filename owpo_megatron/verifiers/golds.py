r"""Gold answers: what of one is the answer, and whether a rule can read it at all.

Data sets keep solutions where an answer is expected (`... #### 2`, `so the answer is $\boxed{2}$`). A gold answer that
no response can equal gives reward 0 without a word, so `owpo data check`, `owpo verify --golds` and the start of a run
count them.
"""

from __future__ import annotations

import decimal
import json
import math
import re
from functools import lru_cache

from owpo_megatron.verifiers.extraction import final_answer
from owpo_megatron.verifiers.surface import clean, string_form

MAX_WORDS = 6  # of a gold answer that is words, such as `\text{Monday and Tuesday}`
_HASHES = re.compile(r"(?:^|\n)[ \t]*####[ \t]*([^\n]+?)\s*$")
_LIST_OF_ONE = re.compile(r'\[\s*"((?:[^"\\]|\\.)*)"\s*\]')
_COMMAND = re.compile(r"\\(?:begin|end)\s*\{\w+\*?\}|\\[A-Za-z]+")
_WORD = re.compile(r"(?<![A-Za-z])[A-Za-z]{2,}")
_MISSING = ("nan", "null", "<na>", "n/a")  # as tables write a gap
_MARKED = re.compile(r"(?i)\banswer\b|答案|=>")


@lru_cache(maxsize=4096)
def gold_text(gold: str) -> str:
    r"""Extract the answer from a gold answer: the content of its last boxes, the text after `####`, or all of it.

    A sentence such as `Therefore, the answer is: 180.` gives its value, a list of one text its text.

    Example:
        >>> gold_text("1+1=2.\n#### 2"), gold_text("The answer is: 180."), gold_text('["7"]'), gold_text("x+1")
        ('2', '180', '7', 'x+1')
    """
    hashes = _HASHES.search(gold)
    if hashes:
        return hashes[1]
    one = _LIST_OF_ONE.fullmatch(gold.strip())
    if one:
        return str(json.loads(f'"{one[1]}"')) if _is_json(one[1]) else one[1]
    if r"\boxed" in gold or r"\fbox" in gold or (_MARKED.search(gold) and len(_words(gold)) > 2):
        return final_answer(gold) or gold
    return gold


def number_text(value: object) -> str | None:
    """A number of a data file as a text: no exponent, whole ones without a point. None: no number, or not a finite one.

    Example:
        >>> number_text(2.0), number_text(1e-07), number_text(3), number_text(True), number_text(float("nan"))
        ('2', '0.0000001', '3', None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float | decimal.Decimal) or not math.isfinite(value):
        return None
    text = format(decimal.Decimal(repr(value)) if isinstance(value, float) else decimal.Decimal(value), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def unreadable(gold: str, rule: str) -> str | None:
    """Why no response is likely to equal this gold answer under a rule, None where one can.

    Example:
        >>> unreadable("First add 1 and 1, then you get the number two.", "math")
        'prose'
    """
    if gold.strip().lower() in _MISSING:
        return "a missing value"
    if rule == "gsm8k":
        from owpo_megatron.verifiers.one_value import number_of

        return None if number_of(gold.rpartition("####")[2]) is not None else "no number"
    if rule == "multiple_choice":
        from owpo_megatron.verifiers.one_value import letter_of

        return None if letter_of(gold) is not None else "no letter"
    if rule in ("dapo", "dapo_strict_box"):
        return "several lines" if "\n" in gold.strip() else "####" if "####" in gold else None
    if rule == "countdown":
        from owpo_megatron.verifiers.generated_tasks import parse_answer

        try:
            parse_answer(gold)
        except ValueError:
            return "not NUMBERS=TARGET"
        return None
    return _unreadable_mathematics(gold) if rule in ("math", "math_any_symbols") else None


def _unreadable_mathematics(gold: str) -> str | None:
    text = gold_text(gold)
    form = string_form(clean(text))
    if not form:
        return "empty"
    if "####" in form:
        return "####"
    if "\n" in text.strip() and not re.search(r"\\begin|\\\\", text):
        return "several lines"
    if len(_words(clean(text))) > MAX_WORDS:
        return "prose"
    if form.count("{") != form.count("}"):
        return "unbalanced braces"
    return None


def _words(text: str) -> list[str]:
    return _WORD.findall(_COMMAND.sub(" ", text))


def _is_json(inside: str) -> bool:
    try:
        json.loads(f'"{inside}"')
    except ValueError:
        return False
    return True
