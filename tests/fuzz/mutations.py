"""Damage to documents: one to three changes to a tree of JSON values, or to bytes."""

from __future__ import annotations

import copy
import math
from random import Random
from typing import Any

JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64 + 1, -(2**63), 10**30, 0.0, -0.5, 0.1, 1e-300, 1e308,
    math.nan, math.inf, -math.inf, "", " ", "x", "0", "-1", "1e9", "nan", "true", "null", "a\nb", "a\tb", "\x00",
    "\x1b[31m", "é", "数", "\u202e", "../..", "/etc/passwd", "~", "x" * 5000, "{", "[1", "step_000001",
    [], [None], [[]], [1, 2, 3], ["a", "a"], {}, {"": None}, {"a": {"a": {"a": 1}}}, {"x" * 300: 1}, [{}] * 3,
)  # fmt: skip


def mutated(value: Any, random: Random) -> Any:
    """A copy with some places replaced, removed, renamed, doubled, or exchanged for another place's value."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return copy.deepcopy(random.choice(JUNK))
        holder, key = random.choice(places)
        match random.randrange(6):
            case 0 | 1:
                holder[key] = copy.deepcopy(random.choice(JUNK))
            case 2:
                del holder[key]
            case 3:
                other, its_key = random.choice(places)
                holder[key] = copy.deepcopy(other[its_key])
            case 4 if isinstance(holder, dict):
                holder[
                    random.choice((str(key) + "_", str(key).upper(), "", str(key)[:-1], random.choice(("a", "b"))))
                ] = holder.pop(key)
            case 4 | 5:
                old = holder[key]
                holder[key] = random.choice(([old], {"a": old}, str(old), f"{old}\n", [old, old]))
    return value


def mutated_bytes(data: bytes, random: Random) -> bytes:
    """A copy that is cut, or has bytes changed, removed, inserted or doubled."""
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(content) + 1)
        size = random.choice((1, 1, 2, 8, 64))
        match random.randrange(6):
            case 0:
                content = content[:at]
            case 1 | 2:
                content[at : at + size] = random.randbytes(size)
            case 3:
                del content[at : at + size]
            case 4:
                content[at:at] = random.choice(
                    (b"\x00", b"\xff\xfe", b"{", b"}", b'"', b"\n", b",", b"9" * 40, b"\xed\xa0\x80")
                )
            case 5:
                content[at:at] = content[at : at + size]
    return bytes(content)


def _places(value: Any) -> Any:
    """(holder, key) of every value inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(inner):
        yield value, key
        yield from _places(child)
