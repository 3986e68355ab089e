r"""DAPO's rule: the last `Answer:` line against the gold answer, as strings (Yu et al. 2025, reward of DAPO-Math-17k).

The normalisation is Minerva's (Lewkowycz et al. 2022, appendix D.1) with all its surprises: `84/2` is not 42, but
`43 = 42` and `square42ways` are. It is here to compare with published runs; `math` is the better verifier.
"""

from __future__ import annotations

import re

from owpo_megatron.types import GradingItem, VerdictReason

TAIL = 300  # characters from the end in which the line is looked for
BOX_TAIL = 100  # the same for the variant that wants a box
_LINE = re.compile(r"(?i)answer\s*:\s*([^\n]+)")
# Order matters in both tables: later entries see what earlier ones left.
_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
_REMOVED = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet",
    "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
)  # fmt: skip
_UNWRAPPED = tuple(re.compile(rf"\\{name}\{{(.*?)\}}") for name in ("text", "textbf", "overline"))
_BOXED = re.compile(r"\\boxed\{(.*)\}")
_SPAN = re.compile(r"(.*?)\$(.*?)\$(.*)")
_FRACTION = re.compile(r"frac([^{])(.)")
_ROOT = re.compile(r"sqrt([^{])")


def grade_dapo(item: GradingItem) -> VerdictReason:
    """`ok` if the last answer line of the last 300 characters has the gold answer's normal form."""
    lines = _LINE.findall(item.response[-TAIL:])
    if not lines:
        return "no_answer"
    gold = _last_box(item.answer)
    return "ok" if normalise(lines[-1]) == normalise(item.answer if gold is None else gold) else "wrong"


def grade_dapo_strict_box(item: GradingItem) -> VerdictReason:
    """The rule's variant for boxes: the last box of the last 100 characters, letter for letter."""
    answer = _last_box(item.response[-BOX_TAIL:])
    if answer is None:
        return "no_answer"
    return "ok" if answer == item.answer else "wrong"


def normalise(answer: str) -> str:
    r"""Minerva's normal form of a final answer.

    Example:
        >>> normalise(r"x = \text{42} degrees"), normalise("1,234"), normalise(r"\frac12")
        ('42', '1234', '\\frac{1}{2}')
    """
    text = answer.rpartition("=")[2]
    for before, after in _REPLACED:
        text = text.replace(before, after)
    for name in _REMOVED:
        text = text.replace(name, "")
    text = _SPAN.sub(r"$\2$", text)
    for wrapper in _UNWRAPPED:
        text = wrapper.sub(r"\1", text)
    text = _BOXED.sub(r"\1", text)
    text = _ROOT.sub(r"sqrt{\1}", _FRACTION.sub(r"frac{\1}{\2}", text)).replace("$", "")
    digits = text.replace(",", "")
    return digits if digits.isdigit() else text.strip()


def _last_box(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    depth = 0
    for index in range(start + len("\\boxed"), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : index]
    return None
