"""A calculator with Python's operators: an expression is parsed and evaluated node by node, never executed."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from owpo_megatron.environments.tools import ToolEnvironment, ToolError

MAX_CHARACTERS = 1000
MAX_BITS = 4096  # of an integer on the way
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(math, name)
    for name in ("sqrt", "exp", "log", "log2", "log10", "sin", "cos", "tan", "atan", "floor", "ceil", "gcd", "isqrt")
} | {"abs": abs, "round": round, "min": min, "max": max}
_CONSTANTS = {"pi": math.pi, "e": math.e}


class Calculator(ToolEnvironment):
    """Arithmetic, as Python writes it.

    Example:
        >>> Calculator().step('<tool_call>{"name": "calculator", "arguments": {"expression": "6 * 7"}}</tool_call>')
        (Observation(text='42', calls=1, errors=0), False, None)
    """

    name = "calculator"
    description = "Evaluates an arithmetic expression in Python's notation."
    parameters: Mapping[str, str] = {
        "expression": f"numbers, + - * / // % **, parentheses, pi, e, and {', '.join(sorted(_FUNCTIONS))}"
    }

    def call(self, arguments: Mapping[str, str]) -> str:
        return calculate(arguments["expression"])


def calculate(expression: str) -> str:
    """The value as Python prints it.

    Raises:
        ToolError: it is no such expression, or its value is too large.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ToolError(f"more than {MAX_CHARACTERS} characters")
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        return str(value)
    except ToolError:
        raise
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ToolError(str(error).partition("\n")[0] or type(error).__name__) from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow):
            _check_power(left, right)
        return _bounded(_BINARY[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        if node.keywords:
            raise ToolError("functions take no keywords here")
        return _bounded(_FUNCTIONS[node.func.id](*(_value(argument) for argument in node.args)))
    raise ToolError(f"no {type(node).__name__} in an arithmetic expression")


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_BITS:
        raise ToolError("the value is too large")


def _bounded(value: Any) -> Any:
    if isinstance(value, complex):
        raise ToolError("the value is no real number")
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ToolError("the value is too large")
    return value
