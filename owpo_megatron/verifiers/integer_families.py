r"""Answers that run over integers: families such as `k\pi, k\in\mathbb{Z}`, and residues `x\equiv 1\pmod{4}`."""

from __future__ import annotations

import re

_INTEGERS = re.compile(
    r"(?P<value>.*?[^\s,;])\s*(?:\\q?quad|\\[,;: ]|[,;(\s]"
    r"|\\text\s*\{[\s,(]*(?:where|for|with|and|for all|for any)?\s*\}"
    r"|\bwhere\b|\bfor\b|\bwith\b|\\forall|\\mid|\\colon|[:|])+\s*(?P<name>[a-zA-Z])\s*"
    r"(?:\\in\s*(?:\\mathbb|\\mathbf|\\Bbb)?\s*\{?\s*\\?(?P<set>[ZNQR])\s*\}?(?P<sign>(?:\^|_)\{?[+*0]\}?)?"
    r"|(?:\\text\s*\{\s*)?\s*(?:is\s+)?(?:an?\s+|any\s+)?(?P<word>integer)s?\s*\}?)\s*\)?",
    re.DOTALL,
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
    builder = _SET.fullmatch(text.strip())
    return builder[1] if builder else text.strip()
