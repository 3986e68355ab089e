r"""Answers that run over integers: families such as `k\pi, k\in\mathbb{Z}`, and residues `x\equiv 1\pmod{4}`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

_INTEGERS = re.compile(
    r"(?P<value>.*?[^\s,;])\s*(?:\\q?quad|\\[,;: ]|[,;(\s]"
    r"|\\text\s*\{[\s,(]*(?:where|for|with|and|for all|for any)?\s*\}"
    r"|\bwhere\b|\bfor\b|\bwith\b|\\forall|\\mid|\\colon|[:|])+\s*(?P<name>[a-zA-Z])\s*"
    r"(?:(?:\\in|in(?![a-z]))\s*(?:\\mathbb|\\mathbf|\\Bbb)?\s*\{?\s*\\?(?P<set>[ZNQR])\s*\}?(?P<sign>(?:\^|_)\{?[+*0]\}?)?"
    r"|(?:\\text\s*\{\s*)?\s*(?:is\s+)?(?:an?\s+|any\s+)?(?P<word>integer)s?\s*\}?)\s*\)?",
    re.DOTALL,
)

_NAMED_LAST = re.compile(
    r"(?:\\text\s*\{)?[\s,(]*(?:(?:where|for|with)\s+)?(?:(?:any|all|some|every|an)\s+)?integers?\s*\}?\s*\$?([a-z])\$?\s*\}?\s*\)?$"
)
_SET = re.compile(
    r"(?:\\left)?\s*\\\{\s*(?:[a-z]\s*(?:\\mid|\\vert|\\colon|:|\|)\s*(?=[a-z]\s*=))?(.*?)\s*(?:\\right)?\\\}",
    re.DOTALL,
)
_LETTER = r"(?<![\\A-Za-z]){}(?![A-Za-z])"
_SPACE = r"(?:\s|\\[,;: ]|~|\\q?quad(?![a-z]))*"
_MODULUS = re.compile(
    rf"{_SPACE}(?:\\pmod{_SPACE}\{{?\s*(\w+)\s*\}}?|\(\s*(?:\\b?mod(?![a-z])|\\(?:text|mathrm)\s*\{{\s*mod\s*\}}|mod\b)"
    rf"{_SPACE}\{{?\s*(\w+)\s*\}}?\s*\)|\\b?mod(?![a-z]){_SPACE}\{{?\s*(\w+)\s*\}}?)"
)
_RESIDUE = re.compile(rf"([A-Za-z]){_SPACE}\\equiv{_SPACE}(-?[0-9]{{1,9}}),?\\pmod\{{([1-9][0-9]{{0,8}})\}}")


def same_parameter(answer: str, gold: str) -> tuple[str, str]:
    r"""The values of two families with one name for their parameter: `k\pi, k\in\mathbb{Z}` is `n\pi, n\in\mathbb{Z}`.

    Unchanged where they are no families, or run over different sets. An answer that gives the range of its parameter
    equals a gold answer that takes integers for granted.
    """
    ours, theirs = _INTEGERS.fullmatch(_inside(answer)), _INTEGERS.fullmatch(_inside(gold))
    if ours is not None and theirs is None and _range(ours) == ("Z", ""):
        return (ours["value"] if re.search(_LETTER.format(ours["name"]), gold) else answer), gold
    if ours is None or theirs is None or _range(ours) != _range(theirs):
        return answer, gold
    name, wanted = ours["name"], theirs["name"]
    value = ours["value"]
    if name != wanted:
        if re.search(_LETTER.format(wanted), value):
            return answer, gold
        value = re.sub(_LETTER.format(name), wanted, value)
    return value, theirs["value"]


def same_family(answer: str, gold: str, number: Callable[[str], Any]) -> bool:
    r"""Whether both run over all integers and through the same numbers: `\frac{5\pi}{4}+n\pi` and `\frac{\pi}{4}+k\pi`.

    Args:
        number: reads a text as a sympy number, None where it is none.
    """
    ours, theirs = _INTEGERS.fullmatch(_inside(answer)), _INTEGERS.fullmatch(_inside(gold))
    if ours is None or theirs is None or not _range(ours) == _range(theirs) == ("Z", ""):
        return False
    (first, step), (wanted, stride) = _line(ours, number), _line(theirs, number)
    if step is None or stride is None or not stride or not _near(abs(step), abs(stride)):
        return False
    shift = (first - wanted) / stride
    return _near(shift, round(shift))


def _line(match: re.Match[str], number: Callable[[str], Any]) -> tuple[Any, Any]:
    """(value at 0, difference) of a family that is linear in its parameter, (None, None) of any other."""
    if len(re.findall(_LETTER.format(match["name"]), match["value"])) != 1:
        return None, None  # a polynomial could agree with a line wherever it is looked at
    values = [number(re.sub(_LETTER.format(match["name"]), f"({place})", match["value"])) for place in (0, 1, 2, -3)]
    if any(value is None or not value.is_real for value in values):
        return None, None
    zero, one, two, below = values
    step = one - zero
    if not (_near(two - one, step) and _near(zero - below, 3 * step)):
        return None, None
    return zero, step


def _near(one: Any, other: Any) -> bool:
    return bool(abs(one - other) <= 1e-15 * max(abs(one), abs(other), 1))


def _range(match: re.Match[str]) -> tuple[str, str]:
    return match["set"] or "Z", (match["sign"] or "").strip("{}")


def same_residue(answer: str, gold: str) -> bool:
    r"""Whether both are one residue class of one variable: `x\equiv5\pmod 4` is `x \equiv 1 (\text{mod } 4)`."""
    ours, theirs = (_RESIDUE.fullmatch(_MODULUS.sub(_modulus, text).strip()) for text in (answer, gold))
    if ours is None or theirs is None or ours[1] != theirs[1] or ours[3] != theirs[3]:
        return False
    return (int(ours[2]) - int(theirs[2])) % int(ours[3]) == 0


def _modulus(match: re.Match[str]) -> str:
    return rf"\pmod{{{match[1] or match[2] or match[3]}}}"


def _inside(text: str) -> str:
    r"""Return what a set builder lists: `k\pi \mid k\in\mathbb{Z}` of `\{k\pi \mid k\in\mathbb{Z}\}`."""
    text = _NAMED_LAST.sub(r", \1\\in\\mathbb{Z}", text.strip())
    builder = _SET.fullmatch(text)
    return builder[1] if builder else text
