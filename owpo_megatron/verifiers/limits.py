"""Refuse what is too large to be an answer: by its text before any parser, by its expression before any evaluation.

The pool's deadline covers everything else; with these checks the common hostile answers cost microseconds instead of
the whole deadline.
"""

from __future__ import annotations

import math
import re
from typing import Any

from owpo_megatron.types import VerdictReason

MAX_CHARACTERS = 1000
MAX_NESTING = 10
MAX_GOLD_NESTING = 14  # the parser's time doubles every few levels
MAX_DIGITS = 100  # in one number
MAX_COMMANDS = 120
MAX_NODES = 600  # of an expression
MAX_DIGITS_OF_VALUE = 3000  # of an exact integer power or factorial
MAX_POLYNOMIAL_DEGREE = 24  # of a sum that is raised to a power, or of a function's power
MAX_TERMS = 200  # of a finite sum or product
MAX_POWERS = 40
MAX_CELLS = 20  # ampersands in a determinant, which the parser evaluates
_DETERMINANT = re.compile(r"[vV]matrix|\\det(?![A-Za-z])|\^\s*\{?\s*(?:-\s*1|[0-9]{2})")
_BIG_OPERATORS = re.compile(r"\\(?:big(?:cup|cap|oplus|wedge|vee|sqcup)|iint|iiint|oint)(?![A-Za-z])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_LONG_NUMBER = re.compile(f"[0-9]{{{MAX_DIGITS + 1}}}")
_FLOAT_EXPONENT = re.compile(r"[0-9.][eE][+-]?[0-9]{4}")
_TOWER = re.compile(r"(?:\^|\*\*)[^,=]{0,40}(?:\^|\*\*)[^,=]{0,40}(?:\^|\*\*)")
_OPENERS = re.compile(r"(?:\s*(?:\\left)?\s*[{(\[]){6}")
_FACTORIALS = re.compile(r"!\s*\)?\s*!\s*\)?\s*!|[0-9]{5,}\s*\)*\s*!")


def refuse_text(answer: str, gold: str) -> VerdictReason | None:
    """Why an answer is not even parsed, or None. Linear in the answer. What the gold answer contains is allowed."""
    if _OPENERS.search(answer) or _OPENERS.search(gold) or nesting(gold) > MAX_GOLD_NESTING:
        return "parse_failed"  # a gold answer like that is compared as a string only
    if len(answer) > max(MAX_CHARACTERS, 2 * len(gold)):
        return "too_long"
    if nesting(answer) > max(MAX_NESTING, min(nesting(gold), MAX_GOLD_NESTING)):
        return "too_long"
    if answer.count("^") > max(MAX_POWERS, gold.count("^")):
        return "too_long"
    if len(_COMMAND.findall(answer)) > max(MAX_COMMANDS, 2 * gold.count("\\")):
        return "too_long"
    if _DETERMINANT.search(answer) and answer.count("&") > max(MAX_CELLS, gold.count("&")):
        return "too_long"
    for pattern in (_LONG_NUMBER, _FLOAT_EXPONENT, _TOWER, _FACTORIALS, _BIG_OPERATORS):
        if pattern.search(answer) and not pattern.search(gold):
            return "parse_failed"
    return None


def nesting(text: str) -> int:
    """Depth of brackets of any kind, whether they match or not; a run of signs or carets counts as depth, too."""
    depth = deepest = run = 0
    previous = ""
    for character in text:
        if character in "{([":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "})]":
            depth = max(0, depth - 1)
        if character in "-+^_~!|":
            run = run + 1 if character == previous else 1
            deepest = max(deepest, run)
        previous = character
    return deepest


def refuse_expression(expression: Any, gold: Any) -> bool:
    """Whether evaluating this sympy object could take long, judged without evaluating it.

    Unbounded sums, integrals and limits are allowed only if the gold answer has one too: a final answer is evaluated.
    """
    own = _Cost()
    own.visit(expression)
    if own.heavy:
        allowed = _Cost()
        if gold is not None:
            allowed.visit(gold)
        return own.nodes > max(MAX_NODES, 2 * allowed.nodes) or not own.heavy <= allowed.heavy
    return own.nodes > MAX_NODES


class _Cost:
    """Nodes of an expression and the kinds of heavy parts in it."""

    def __init__(self) -> None:
        self.nodes = 0
        self.heavy: set[str] = set()

    def visit(self, root: Any) -> None:
        stack = [root]
        while stack and self.nodes <= 10 * MAX_NODES:
            node = stack.pop()
            self.nodes += 1
            self._judge(node)
            stack.extend(getattr(node, "args", ()))
            if hasattr(node, "flat") and hasattr(node, "shape"):
                stack.extend(node.flat())
        if self.nodes > MAX_NODES:
            self.heavy.add("size")

    def _judge(self, node: Any) -> None:
        name = type(node).__name__
        if name in ("Pow", "exp"):
            base, exponent = node.as_base_exp()
            self._power(node, base, exponent)
        elif name in ("factorial", "factorial2", "gamma", "subfactorial", "binomial", "zeta", "Mod", "fibonacci"):
            if any(magnitude(argument) > math.log10(1000) for argument in node.args):
                self.heavy.add(name)
        elif name in ("Sum", "Product"):
            if not self._short(node):
                self.heavy.add(name)
        elif name in ("Integral", "Limit", "Derivative", "Union") and (name != "Union" or len(node.args) > 20):
            self.heavy.add(name)
        elif name in ("Determinant", "Inverse", "MatPow") and max(getattr(node.args[0], "shape", (0,)), default=0) > 5:
            self.heavy.add("matrix")

    def _power(self, node: Any, base: Any, exponent: Any) -> None:
        size = magnitude(exponent)
        if magnitude(node) > MAX_DIGITS_OF_VALUE:
            self.heavy.add("power")
        if base.free_symbols and not exponent.free_symbols and 10 ** min(size, 9) > MAX_POLYNOMIAL_DEGREE:
            self.heavy.add("degree")
        numerator, denominator = exponent.as_numer_denom() if exponent.is_number else (exponent, exponent)
        if exponent.is_Rational and denominator.is_Integer and int(denominator) > 100:
            self.heavy.add("root")
        if exponent.is_number and base.is_number and not base.is_Integer and size > 3:
            self.heavy.add("power")

    @staticmethod
    def _short(node: Any) -> bool:
        for limits in node.limits:
            if len(limits) != 3 or not (limits[1].is_Integer and limits[2].is_Integer):
                return False
            if not 0 <= int(limits[2]) - int(limits[1]) <= MAX_TERMS:
                return False
        return True


def magnitude(expression: Any, depth: int = 0) -> float:
    """An upper bound of log10 of the absolute value, inf where it is huge; 0 for what has no number in it.

    Computed from the parts in floating point; nothing is evaluated exactly.
    """
    if depth > 30:
        return math.inf
    if getattr(expression, "is_Integer", False):
        return max(0.0, int(expression).bit_length() * math.log10(2))
    if getattr(expression, "is_Rational", False):
        return max(0.0, (abs(expression.p).bit_length() - expression.q.bit_length() + 1) * math.log10(2))
    if getattr(expression, "is_Float", False):
        return max(0.0, float(expression._mpf_[2] + expression._mpf_[3]) * math.log10(2))
    name = type(expression).__name__
    parts = [magnitude(argument, depth + 1) for argument in getattr(expression, "args", ())]
    if not parts:
        return 1.0 if getattr(expression, "is_number", False) else 0.0
    if name in ("Pow", "exp"):
        base, exponent = expression.as_base_exp()
        power = magnitude(exponent, depth + 1)
        own = max(magnitude(base, depth + 1), 0.5) if base.is_number else 0.0
        if not exponent.is_number:
            return own
        return math.inf if power > 12 else own * 10**power
    if name in ("factorial", "gamma", "factorial2"):
        return math.inf if parts[0] > 6 else 10 ** parts[0] * max(parts[0], 1.0)
    if name == "Mul":
        return math.fsum(parts)
    return max(parts) + math.log10(len(parts)) if len(parts) > 1 else parts[0]
