"""When two problems are the same: three readings of a text, from strict to loose."""

from __future__ import annotations

import re

_WORDS = re.compile(r"[a-z]+|[0-9]+|[^\W0-9a-z_]")  # a word, a number, or one letter of a script without spaces
_CJK = re.compile(r"[\u3400-\u9fff]")


def without_spaces(text: str) -> str:
    """Texts that differ in white space only are the same problem."""
    return "".join(text.split())


def letters_and_digits(text: str) -> str:
    """Texts that differ in punctuation or LaTeX's spelling of it ($x$ and \\(x\\)) are probably the same problem.

    Not always: it also equates x + 1 with x - 1, so nothing is left out for it unless asked.
    """
    return "".join(character for character in text.lower() if character.isalnum())


def words(text: str) -> list[str]:
    """What contamination compares sequences of.

    Example:
        >>> words(r"Find $\\frac{12}{x}$.")
        ['find', 'frac', '12', 'x']
    """
    return _WORDS.findall(text.lower())


def is_chinese(text: str) -> bool:
    return _CJK.search(text) is not None
