r"""Rows of `\begin{cases}`: a list of assignments, or a function defined by its branches."""

from __future__ import annotations

import re
from collections.abc import Callable

from owpo_megatron.verifiers.surface import string_form

MAX_BRANCHES = 8
_BLOCK = re.compile(
    r"(?:\\left)?\s*(?:\\?\{|\.)?\s*\\begin\s*\{(cases|aligned|array|gathered|matrix|align\*?|split)\}(?:\{[lcr| ]*\})?"
    r"(.*?)\\end\s*\{\1\}\s*(?:\\right\s*\.?|\\?\}(?=\s*$))?",
    re.DOTALL,
)
_ASSIGNMENT = re.compile(r"\s*[A-Za-z](?:_\{?\w{1,4}\}?)?\s*&?\s*=\s*[^=&<>]+")
_OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])|\\lor(?![a-z])|\\vee(?![a-z])")
_ASSIGNED = re.compile(r"(?<![A-Za-z\\])([A-Za-z](?:_\{?\w\}?)?)\s*=")
_ROW_END = re.compile(r"\\\\(?:\[[^\]]*\])?")
_HEAD = re.compile(
    r"\s*[A-Za-z](?:_\{?\w{1,4}\}?)?\s*(?:\([^()=]{0,20}\))?\s*=\s*(?=(?:\\left)?\s*(?:\\?\{)?\s*\\begin)"
)
_IF = re.compile(
    r"^(?:\s|\\[,;: ]|\\q?quad|,)*(?:\\(?:text|mbox|mathrm)\s*\{\s*(?:if|for|when|where)\s*\}|(?:if|for|when)\b)?"
)
_WORDS_IF = re.compile(r"\\text\s*\{\s*(?:if|for|when|where)\s+([^{}]*)\}")
_RELATIONS = ((r"\leqslant", r"\le"), (r"\geqslant", r"\ge"), (r"\leq", r"\le"), (r"\geq", r"\ge"), (r"\neq", r"\ne"),
    ("<=", r"\le"), (">=", r"\ge"), (r"\lt", "<"), (r"\gt", ">"))  # fmt: skip


def as_list(text: str) -> str:
    r"""`\begin{cases}x=1\\y=2\end{cases}` and `x=1\\y=2` as `x=1,y=2`; a function defined by cases stays."""
    block = _BLOCK.fullmatch(text.strip())
    if block is None and ("\\\\" not in text or "\\begin" in text):
        return text
    inner = text if block is None else block[2]
    rows = [row.strip().rstrip(",;.").replace("&=", "=").strip() for row in _ROW_END.split(inner)]
    rows = [row for row in rows if row]
    return ", ".join(rows) if rows and all(map(_ASSIGNMENT.fullmatch, rows)) else text


def undecided(text: str) -> bool:
    """Whether one variable or another gets a value: `x=1 or y=2` claims less than `x=1, y=2`."""
    return _OR.search(text) is not None and len(set(_ASSIGNED.findall(text))) > 1


def same_branches(answer: str, gold: str, same: Callable[[str, str], bool]) -> bool:
    r"""Whether both are functions defined by cases with the same value under each condition, in any order.

    Args:
        same: whether two texts are equal, (answer, gold).
    """
    ours, theirs = _branches(answer), _branches(gold)
    if ours is None or theirs is None or len(ours) != len(theirs):
        return False
    left = list(theirs)
    for value, condition in ours:
        found = next((one for one in left if _same_condition(condition, one[1], same) and same(value, one[0])), None)
        if found is None:
            return False
        left.remove(found)
    return True


def _branches(text: str) -> list[tuple[str, str]] | None:
    """(value, condition) of each row, None where some row has no condition."""
    head = _HEAD.match(text)
    block = _BLOCK.fullmatch(text[head.end() :].strip() if head else text.strip())
    if block is None or block[1] not in ("cases", "array"):
        return None
    rows = [row for row in (row.strip() for row in _ROW_END.split(block[2])) if row]
    parts = [row.split("&") for row in rows]
    if not 1 < len(rows) <= MAX_BRANCHES or any(len(part) != 2 for part in parts):
        return None
    return [(value.strip().rstrip(",;").strip(), _condition(condition)) for value, condition in parts]


def _condition(text: str) -> str:
    text = _WORDS_IF.sub(r"\1", text)
    text = _IF.sub("", text).strip()
    for spelling, plain in _RELATIONS:
        text = re.sub(re.escape(spelling) + r"(?![A-Za-z])", f"{plain} ".replace("\\", r"\\"), text)
    return string_form(text).replace(" ", "").rstrip(".,;")


def _same_condition(ours: str, theirs: str, same: Callable[[str, str], bool]) -> bool:
    return ours == theirs or same(ours, theirs)
