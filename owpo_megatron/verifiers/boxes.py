r"""The last box of a response, with those beside it that belong to it, and answers that are taken back."""

from __future__ import annotations

import re

MAX_MARKERS = 40  # markers that are looked at, from the last one backwards
MAX_BOX = 4000  # characters of a box; a longer one counts as not closed
BOXES = (r"\boxed", r"\fbox")
_TOKEN = re.compile(r"\\[A-Za-z]+|[0-9]+(?:\.[0-9]+)?|[A-Za-z]")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is a character
_DENIED = re.compile(r"(?:\bnot|n't|never|instead of|rather than|\\neq?|≠|(?<![0-9\\])%)[\s$(\\]*$", re.IGNORECASE)
_TAKEN_BACK = re.compile(r"[\s$)\\*]{0,6}(?:\?|(?:is|was|would be)\s+(?:not|wrong|incorrect|false)\b)", re.IGNORECASE)
_REOPENED = re.compile(
    r"[\s$)\\\].!*,;]{0,8}(?:(?:but|oh|um|so|no),?\s+)?(?:wait|hold on|hang on|hmm+|maybe not|perhaps not|no[,.] )\b",
    re.IGNORECASE,
)
_SETTLED = re.compile(
    r"(?<!not )(?<!n't )\b(?:yes|correct|confirmed|confirms|verified|right|matches|consistent|indeed|stands|good|great"
    r"|fine|checks? out|the same|i'm sure|final)\b|✓|✔",
    re.IGNORECASE,
)

# Separators between boxes that together are one answer: `\boxed{1}, \boxed{2} and \boxed{3}`.
_DELIMITERS = re.compile(r"\\[()\[\]]|\$|\\q?quad(?![a-z])|\\[,;:! ]|~|\\text\s*\{([^{}]*)\}|[{}]|\*\*")
_ASSIGNED = re.compile(r"[A-Za-z](?:_\{?\w\}?)?\s*=\s*")
_JOINT = re.compile(r"\s*(?:[,;&]|\b(?:and|or)\b)*\s*(?:and|or)?\s*", re.IGNORECASE)


def joined_boxes(text: str) -> str | None:
    """Content of the last box, joined with those before it that only separators divide."""
    contents: list[str] = []
    start = end = len(text)
    for _ in range(MAX_MARKERS):
        box = max(text.rfind(name, 0, start) for name in BOXES)
        if box < 0:
            break
        content, stop = _braced(text, box)
        if content is None or is_taken_back(text, box, stop):  # empty, unclosed, or denied
            break
        if not contents and is_withdrawn(text, stop):
            return None
        if contents and stop >= end:  # around the one just found: the outer box is the answer
            contents[-1] = content
        elif contents and not _is_joint(text[stop:start]):
            break
        elif not contents or contents[-1] != content:
            contents.append(content)
        start, end = box, stop
    return ", ".join(reversed(contents)) or None


def is_taken_back(text: str, start: int, end: int) -> bool:
    """`not \\boxed{42}`, `\\boxed{42} is wrong`, `\\boxed{42}?` and a box in a comment claim nothing."""
    return bool(_DENIED.search(text, max(0, start - 40), start) or _TAKEN_BACK.match(text, end))


def is_withdrawn(text: str, end: int) -> bool:
    """`42. Wait, maybe not. Let me recompute`: what follows reopens the question and does not settle it again."""
    return bool(_REOPENED.match(text, end)) and not _SETTLED.search(text, end)


def _is_joint(between: str) -> bool:
    if len(between) > 80:
        return False
    plain = _DELIMITERS.sub(lambda match: match.group(1) or " ", between)
    return _JOINT.fullmatch(_ASSIGNED.sub(" ", plain)) is not None


def _braced(text: str, start: int) -> tuple[str | None, int]:
    r"""(Content, end) of the box command at `start`; the content is None if it is empty or not closed.

    `\boxed 5` holds the one token, as in TeX.
    """
    index = start + len(BOXES[0] if text.startswith(BOXES[0], start) else BOXES[1])
    while index < len(text) and text[index] in " \t\n":
        index += 1
    if not text.startswith("{", index):
        token = _TOKEN.match(text, index)
        return (token.group(), token.end()) if token else (None, index)
    depth = 0
    for brace in _BRACE.finditer(text, index, min(len(text), index + MAX_BOX)):
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[index + 1 : brace.start()].strip() or None, brace.end()
    return None, len(text)
