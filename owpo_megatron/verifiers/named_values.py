"""Values with names (`x=3, y=4`) against values without (`(4, 3)`): which belongs to which is part of the answer."""

from __future__ import annotations

import re
from collections.abc import Callable

_SEPARATOR = re.compile(r"\\text\s*\{\s*(?:and|,|;)\s*\}|\\q?quad|(?<![A-Za-z\\])and(?![A-Za-z])|\\\\|[,;&]")
_NAMED = re.compile(r"\s*([A-Za-z](?:_\{?\w+\}?)?)\s*=\s*([^=<>]+?)\s*")
_BRACKETS = (("(", ")"), ("[", "]"), (r"\{", r"\}"), (r"\langle", r"\rangle"))
MOST = 8  # values that are looked at


def misplaced(answer: str, gold: str, same: Callable[[str, str], bool]) -> bool:
    """Whether the answer has the gold answer's values without names, in another order than the names have.

    Both the gold answer's order and that of the alphabet are right. False wherever there is nothing to compare.

    Args:
        same: whether two single values are equal.

    Example:
        >>> [misplaced(text, "x=3, y=4", str.__eq__) for text in ("(4,3)", "(3,4)", "x=3,y=4", "(5,6)")]
        [True, False, False, False]
    """
    if "=" in answer or "=" not in gold:
        return False
    members = [_NAMED.fullmatch(part) for part in _parts(gold)]
    named = [(member[1], member[2]) for member in members if member]
    ours = _parts(_without_brackets(answer))
    if not 2 <= len(named) <= MOST or not len(dict(named)) == len(named) == len(members) == len(ours):
        return False
    values, by_name = ([value for _, value in order] for order in (named, sorted(named)))
    if any(all(map(same, ours, order)) for order in (values, by_name)):
        return False
    return all(any(same(one, value) for value in values) for one in ours)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in _SEPARATOR.split(text) if part.strip()]


def _without_brackets(text: str) -> str:
    text = text.strip().replace(r"\left", "").replace(r"\right", "")
    for opening, closing in _BRACKETS:
        if text.startswith(opening) and text.endswith(closing):
            return text[len(opening) : len(text) - len(closing)]
    return text
