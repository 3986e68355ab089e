r"""Sets of real numbers in their two spellings: `(-\infty,1]\cup[3,\infty)` and `x \le 1 \text{ or } x \ge 3`.

Read into sorted, merged intervals whose ends are compared as numbers. Any other text is left undecided.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MAX_PIECES = 12
_OR = re.compile(
    r"\\text\s*\{\s*or\s*\}|(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:big)?cup(?![a-z])|\\lor(?![a-z])|\\vee(?![a-z])|\|\|"
)
_AND = re.compile(
    r"\\text\s*\{\s*and\s*\}|(?<![A-Za-z\\])and(?![A-Za-z])|\\land(?![a-z])|\\wedge(?![a-z])|\\cap(?![a-z])"
)
_MEMBER = re.compile(r"\s*([A-Za-z])\s*\\in(?![a-z])\s*")
_BUILDER = re.compile(
    r"\\?\{\s*([A-Za-z])\s*(?:\\in\s*\\mathbb\s*\{?\s*R\s*\}?\s*)?(?:\\mid|\\vert|\||:|\\colon)\s*((?:(?!\\\}).)+?)\s*\\?\}\s*$"
)
_INTERVAL = re.compile(r"\s*([(\[\]])\s*([^,()\[\]]+|[^,]+?)\s*,\s*([^,]+?)\s*([)\]\[])\s*")  # ]a,b[ is (a,b)
_PUNCTURED = re.compile(
    r"(?:\\mathbb\s*\{?\s*R\s*\}?\s*\\setminus\s*\\?\{\s*([^{}]+?)\s*\\?\}|([A-Za-z])\s*\\neq?(?![a-z])\s*([^=<>]+))\s*"
)
_RELATION = re.compile(r"\\leq?(?:slant)?(?![a-z])|\\geq?(?:slant)?(?![a-z])|\\lt(?![a-z])|\\gt(?![a-z])|<=|>=|<|>")
_SIZING = re.compile(r"\\left|\\right|\\[Bb]igg?[lr]?(?![a-z])|\\displaystyle|\\q?quad(?![a-z])|\\[,;! ]")
_EVIDENT = re.compile(r"\\infty|\\neq?(?![a-z])|\\setminus|\\cup(?![a-z])|\[|\]|\\[lg]e|\\[lg]t(?![a-z])|[<>]|\\mathbb")
_BARS = re.compile(r"\\[lr]?vert(?![a-z])")
_DISTANCE = re.compile(
    r"\|\s*([A-Za-z])\s*(?:([-+])\s*([^|<>=]+?))?\s*\|\s*(<=|>=|<|>|\\[lg](?:eq?|eqslant|t)(?![a-z]))\s*([^|<>=,]+)$"
)
_INFINITE = {r"\infty": 1, r"+\infty": 1, r"-\infty": -1, "inf": 1, "-inf": -1}


@dataclass(frozen=True)
class Piece:
    """An interval; its ends are sympy numbers, oo and -oo among them."""

    low: Any
    high: Any
    has_low: bool
    has_high: bool


def same_set(answer: str, gold: str, number: Callable[[str], Any], strict: bool = True) -> bool:
    """Whether both are evidently sets of real numbers, and the same one.

    Args:
        number: reads a text as a sympy number, None where it is none.
        strict: a variable that both name has to be the same.
    """
    if not (_EVIDENT.search(answer) and _EVIDENT.search(gold)):
        return False
    ours, theirs = read_set(answer, number), read_set(gold, number)
    if ours is None or theirs is None or (strict and ours[1] and theirs[1] and ours[1] != theirs[1]):
        return False
    return len(ours[0]) == len(theirs[0]) and all(map(_same_piece, ours[0], theirs[0]))


def read_set(text: str, number: Callable[[str], Any]) -> tuple[list[Piece], str] | None:
    """(pieces in order, name of the variable or "") of a union or an intersection, None for anything else."""
    text = _without_distance(_SIZING.sub("", text).strip())
    builder = _BUILDER.fullmatch(text)
    if builder:
        inner = read_set(builder[2], number)
        return inner if inner is not None and inner[1] in ("", builder[1]) else None
    names: set[str] = set()
    member = _MEMBER.match(text)
    if member:
        names.add(member[1])
        text = text[member.end() :]
    punctured = _PUNCTURED.fullmatch(text)
    if punctured:
        names.update({punctured[2]} - {None})
        pieces = _around((punctured[1] or punctured[3]).split(","), number)
        return (pieces, "".join(names)) if pieces and len(names) <= 1 else None
    union: list[Piece] = []
    parts = _OR.split(text)
    if len(parts) == 1 and "," in text and _RELATION.search(text):
        return _listed(text, number, names)
    if len(parts) > MAX_PIECES:
        return None
    for part in parts:
        inside: list[Piece] | None = None
        for factor in _AND.split(part):
            piece = _piece(factor, number, names)
            if piece is None:
                return None
            inside = [piece] if inside is None else _crossed(inside[0], piece) if inside else []
        union += inside or []
    return (_merged(union), "".join(names)) if len(names) <= 1 and union else None


def _around(points: list[str], number: Callable[[str], Any]) -> list[Piece]:
    """The real numbers without some points, [] where one is no number."""
    found = [_end(point, number) for point in points]
    if len(found) > MAX_PIECES or any(point is None or point.is_infinite for point in found):
        return []
    ends = [_infinity(-1), *sorted(found), _infinity(1)]
    pieces = [_ordered(low, high, False, False) for low, high in zip(ends, ends[1:], strict=False)]
    return [piece for piece in pieces if piece is not None]


def _without_distance(text: str) -> str:
    r"""`|x-1|<2` as `-(2)+(1)<x<(2)+(1)`, `|x|\ge 2` as two inequalities."""
    match = _DISTANCE.fullmatch(_BARS.sub("|", text))
    if match is None:
        return text
    name, bound = match[1], f"({match[5].strip()})"
    centre = f"({'' if match[2] == '-' else '-'}({match[3]}))" if match[3] else "0"
    sign, closed = _sign(match[4])
    low, high = f"{centre}-{bound}", f"{centre}+{bound}"
    equal = "=" if closed else ""
    if sign == "<":
        return f"{low}<{equal}{name}<{equal}{high}"
    return rf"{name}<{equal}{low}\lor {name}>{equal}{high}"


def _listed(text: str, number: Callable[[str], Any], names: set[str]) -> tuple[list[Piece], str] | None:
    """Two inequalities with a comma between them: both hold where they can, else one of them."""
    pieces = [_piece(part, number, names) for part in text.split(",")]
    first, second = pieces if len(pieces) == 2 else (None, None)
    if first is None or second is None or len(names) != 1:
        return None
    if first.low.is_infinite == second.low.is_infinite or first.high.is_infinite == second.high.is_infinite:
        return None
    return _crossed(first, second) or _merged([first, second]), "".join(names)


def _piece(text: str, number: Callable[[str], Any], names: set[str]) -> Piece | None:
    member = _MEMBER.match(text)
    if member:
        names.add(member[1])
        text = text[member.end() :]
    builder = _BUILDER.fullmatch(text.strip())
    if builder:
        names.add(builder[1])
        text = builder[2]
    interval = _INTERVAL.fullmatch(text)
    if interval:
        low, high = _end(interval[2], number), _end(interval[3], number)
        return _ordered(low, high, interval[1] == "[", interval[4] == "]")
    return _inequality(text, number, names)


def _inequality(text: str, number: Callable[[str], Any], names: set[str]) -> Piece | None:
    sides = [side.strip() for side in _RELATION.split(text)]
    signs = [_sign(sign) for sign in _RELATION.findall(text)]
    places = [place for place, side in enumerate(sides) if re.fullmatch("[A-Za-z]", side) and side not in "ei"]
    if len(sides) not in (2, 3) or len(places) != 1 or len({sign[0] for sign in signs}) > 1:
        return None
    if len(sides) == 3 and places != [1]:
        return None
    names.add(sides[places[0]])
    infinity = _infinity(1)
    low, high, has_low, has_high = -infinity, infinity, False, False
    for place, (sign, closed) in enumerate(signs):
        left_is_variable = place == places[0]
        bound = _end(sides[place + 1] if left_is_variable else sides[place], number)
        if bound is None:
            return None
        if (sign == "<") == left_is_variable:
            high, has_high = bound, closed
        else:
            low, has_low = bound, closed
    return _ordered(low, high, has_low, has_high)


def _sign(text: str) -> tuple[str, bool]:
    less = text.startswith(("<", r"\l"))
    return "<" if less else ">", "=" in text or text.startswith((r"\le", r"\ge"))


def _end(text: str, number: Callable[[str], Any]) -> Any:
    plain = text.replace(" ", "")
    if plain in _INFINITE:
        return _infinity(_INFINITE[plain])
    value = number(text)
    return value if value is not None and value.is_real else None


def _infinity(sign: int) -> Any:
    from sympy import oo

    return oo if sign > 0 else -oo


def _ordered(low: Any, high: Any, has_low: bool, has_high: bool) -> Piece | None:
    if low is None or high is None or not low < high:
        return None
    if (low.is_infinite and has_low) or (high.is_infinite and has_high):
        return None
    return Piece(low, high, has_low, has_high)


def _crossed(one: Piece, other: Piece) -> list[Piece]:
    low = max((one.low, not one.has_low), (other.low, not other.has_low))
    high = min((one.high, one.has_high), (other.high, other.has_high))
    return [Piece(low[0], high[0], not low[1], high[1])] if low[0] < high[0] else []


def _merged(pieces: list[Piece]) -> list[Piece]:
    out: list[Piece] = []
    for piece in sorted(pieces, key=lambda one: (one.low, not one.has_low)):
        last = out[-1] if out else None
        if last is not None and (
            piece.low < last.high or (piece.low == last.high and (piece.has_low or last.has_high))
        ):
            high, has_high = max((last.high, last.has_high), (piece.high, piece.has_high))
            out[-1] = Piece(last.low, high, last.has_low, has_high)
        else:
            out.append(piece)
    return out


def _same_piece(one: Piece, other: Piece) -> bool:
    ends = (_same_end(one.low, other.low), _same_end(one.high, other.high))
    return all(ends) and (one.has_low, one.has_high) == (other.has_low, other.has_high)


def _same_end(one: Any, other: Any) -> bool:
    if one.is_infinite or other.is_infinite:
        return bool(one == other)
    return bool(abs(one - other) <= 1e-15 * max(abs(one), abs(other), 1e-12))
