r"""Find the final answer in a response: the last `\boxed{...}` or `Answer: ...` line, whichever comes later."""

from __future__ import annotations

import re

TAIL_CHARACTERS = 4000  # a final answer is looked for there only; the search is then linear in a short text
_ANSWER_LINE = re.compile(r"(?:^|(?<=\W))answer\s*:[ \t*]*([^\n]+)", re.IGNORECASE)
_BOX = r"\boxed"


def final_answer(response: str) -> str | None:
    r"""The answer's text, stripped, or None if the response has no final answer.

    An unclosed last box is no answer: the response was cut or never finished it. Numbers in running text are none
    either, or every text that happens to mention the number would be right.

    Example:
        >>> final_answer(r"First \boxed{17}. No: \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
        >>> final_answer("so\nAnswer: $34$")
        '$34$'
    """
    tail = response[-TAIL_CHARACTERS:]
    box = tail.rfind(_BOX)
    lines = list(_ANSWER_LINE.finditer(tail))
    if lines and lines[-1].start() > box:
        return lines[-1].group(1).strip() or None
    return _braced(tail, box + len(_BOX)) if box >= 0 else None


def _braced(text: str, start: int) -> str | None:
    """Content of the balanced braces that open at `start` (after spaces)."""
    while start < len(text) and text[start] == " ":
        start += 1
    if start >= len(text) or text[start] != "{":
        return None
    depth = 0
    index = start
    while index < len(text):
        character = text[index]
        if character == "\\":
            index += 1  # an escaped brace is a character
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start + 1 : index].strip() or None
        index += 1
    return None
