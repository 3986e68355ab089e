r"""Numbers that need no parser: integers, decimals, `a/b`, `\frac{a}{b}`, and tuples of them: the bulk of answers."""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = r"[0-9]{1,400}"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)(?:\\frac\{{(?P<over>-?{_DIGITS})\}}\{{(?P<under>{_DIGITS})\}}|(?P<a>{_DIGITS})/(?P<b>{_DIGITS})"
    rf"|(?P<whole>[0-9]{{0,400}})\.(?P<part>{_DIGITS})|(?P<integer>{_DIGITS})\.?)"
)
_BRACKETS = {("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")}
UNDECIDED = Fraction(2, 1_000_000)  # decimals closer than this are left to math-verify, which rounds to six places


def compare(answer: str, gold: str) -> bool | None:
    """Whether two string forms are the same number or tuple; None where that takes a parser.

    Two exact numbers are equal or not; a decimal decides only where rounding to six places cannot matter. Tuples that
    differ stay undecided: a point, an interval and a list may mean the same.
    """
    ours, theirs = _read(answer), _read(gold)
    if ours is not None and theirs is not None:
        difference = abs(ours[0] - theirs[0])
        if not difference:
            return True
        return False if ours[1] and theirs[1] or difference > UNDECIDED else None
    brackets = (answer[:1], answer[-1:])
    if brackets in _BRACKETS and brackets == (gold[:1], gold[-1:]):
        parts, gold_parts = answer[1:-1].split(","), gold[1:-1].split(",")
        if len(parts) == len(gold_parts) <= 50 and all(map(compare, parts, gold_parts)):
            return True
    return None


def number_key(form: str) -> str:
    """A string form with every number in its lowest terms: equal keys are equal numbers, tuples or texts.

    Example:
        >>> number_key("2.0"), number_key("(0.5,3)"), number_key("x+1")
        ('2', '(1/2,3)', 'x+1')
    """
    value = _read(form)
    if value is not None:
        return str(value[0])
    if (form[:1], form[-1:]) in _BRACKETS and "," in form:
        parts = form[1:-1].split(",")
        return f"{form[0]}{','.join(map(number_key, parts))}{form[-1]}" if len(parts) <= 50 else form
    return form


def _read(text: str) -> tuple[Fraction, bool] | None:
    """(Value, is it exact) of a number."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    over, under = match["over"] or match["a"] or match["integer"], match["under"] or match["b"] or "1"
    if over is None:
        value = Fraction(int((match["whole"] or "") + match["part"]), 10 ** len(match["part"]))
    elif int(under):
        value = Fraction(int(over), int(under))
    else:
        return None
    return (-value if match["sign"] == "-" else value), over is not None
