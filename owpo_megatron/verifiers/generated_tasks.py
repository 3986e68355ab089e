"""Rules of the generated tasks: cipher compares symbol by symbol, countdown parses an expression and never runs it.

The reasoning of `sums` has two further rules, named as `python:owpo_megatron.verifiers.generated_tasks:FUNCTION`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from owpo_megatron.types import GradingItem, VerdictReason

SUMS_MARK = "####"
MAX_CHARACTERS = 200
_DIGITS = frozenset("0123456789")  # not str.isdigit: that takes other scripts' digits and superscripts too
_PRECEDENCE = {"+": 1, "-": 1, "*": 2}


class ExpressionError(ValueError):
    """The text is no expression of the grammar."""


def format_answer(numbers: Sequence[int], target: int) -> str:
    """A problem as one string: `format_answer([2, 3, 7], 13) == "2,3,7=13"`."""
    return ",".join(map(str, numbers)) + f"={target}"


def parse_answer(answer: str) -> tuple[list[int], int]:
    """The inverse of `format_answer`."""
    numbers, _, target = answer.partition("=")
    return [int(number) for number in numbers.split(",")], int(target)


def grade_cipher(item: GradingItem) -> VerdictReason:
    """`ok` if the whole finished response equals the answer; a truncated or empty one is no answer."""
    if item.truncated or not item.response:
        return "no_answer"
    return "ok" if item.response == item.answer else "wrong"


def grade_countdown(item: GradingItem) -> VerdictReason:
    """`ok` if the finished response is an expression that uses each number once and has the target as its value."""
    text = item.response.strip(" ")
    if item.truncated or not text:
        return "no_answer"
    if len(text) > MAX_CHARACTERS:
        return "too_long"
    try:
        value, used = evaluate(text)
    except ExpressionError:
        return "parse_failed"
    numbers, target = parse_answer(item.answer)
    return "ok" if sorted(used) == sorted(numbers) and value == target else "wrong"


def grade_sums(item: GradingItem) -> VerdictReason:
    """`ok` if the finished response has the answer behind its last mark."""
    _, mark, given = item.response.rpartition(SUMS_MARK)
    if item.truncated or not mark or not given:
        return "no_answer"
    return "ok" if given == item.answer else "wrong"


def sums_steps(response: str, answer: str, prompt: str) -> dict[str, Any]:
    """The verdict of `grade_sums`, and as the part `process` the share of its steps that are right.

    A step is right if it adds the next digit to what the response wrote before.

    Example:
        >>> sums_steps("7607####7", "7", "34857=")  # 7 + 8 is 5, and from 6 on 6 + 5 is 1
        {'correct': True, 'parts': {'process': 0.5}}
    """
    written, mark, given = response.rpartition(SUMS_MARK)
    digits = prompt.rstrip("=")
    before = digits[:1] + written
    right = [
        step.isdecimal() and before[place].isdecimal() and running_sums(before[place] + digits[place + 1])[-1] == step
        for place, step in enumerate(written[: len(digits) - 1])
    ]
    return {"correct": bool(mark) and given == answer, "parts": {"process": sum(right) / (len(digits) - 1)}}


def sums_sound(response: str, answer: str, prompt: str) -> bool:
    """Whether every running sum is right and the answer is the last of them: a rule for `eval.chain`.

    Example:
        >>> sums_sound("7507####7", "7", "34857="), sums_sound("7607####7", "7", "34857=")
        (True, False)
    """
    return response == f"{running_sums(prompt.rstrip('='))}{SUMS_MARK}{answer}"


def running_sums(digits: str) -> str:
    """Sums modulo 10 after each digit but the first.

    Example:
        >>> running_sums("34857")
        '7507'
    """
    total, sums = int(digits[0]), ""
    for digit in digits[1:]:
        total = (total + int(digit)) % 10
        sums += str(total)
    return sums


def evaluate(text: str) -> tuple[int, list[int]]:
    """Value of an expression and the numbers it uses, from left to right.

    Grammar: integers without sign or leading zero, `+ - *` with the usual precedence, left-associative, parentheses,
    spaces between tokens. No recursion, so no text is nested too deep (Dijkstra's shunting-yard algorithm).

    Raises:
        ExpressionError: the text is not of this grammar.

    Example:
        >>> evaluate("2*(3+7)")
        (20, [2, 3, 7])
    """
    values: list[int] = []
    operators: list[str] = []
    used: list[int] = []
    expects_operand = True
    for token in _tokens(text):
        if expects_operand and token[0] in _DIGITS:
            values.append(int(token))
            used.append(int(token))
            expects_operand = False
        elif expects_operand and token == "(":
            operators.append(token)
        elif not expects_operand and token in _PRECEDENCE:
            while operators and operators[-1] != "(" and _PRECEDENCE[operators[-1]] >= _PRECEDENCE[token]:
                _apply(operators.pop(), values)
            operators.append(token)
            expects_operand = True
        elif not expects_operand and token == ")":
            while operators and operators[-1] != "(":
                _apply(operators.pop(), values)
            if not operators:
                raise ExpressionError("unopened parenthesis")
            operators.pop()
        else:
            raise ExpressionError(f"unexpected {token!r}")
    if expects_operand:
        raise ExpressionError("ends where a number is expected")
    while operators:
        operator = operators.pop()
        if operator == "(":
            raise ExpressionError("unclosed parenthesis")
        _apply(operator, values)
    return values[0], used


def _apply(operator: str, values: list[int]) -> None:
    right, left = values.pop(), values.pop()
    values.append(left + right if operator == "+" else left - right if operator == "-" else left * right)


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    index = 0
    while index < len(text):
        character = text[index]
        end = index + 1
        if character in _DIGITS:
            while end < len(text) and text[end] in _DIGITS:
                end += 1
            if character == "0" and end > index + 1:
                raise ExpressionError("leading zero")
            tokens.append(text[index:end])
        elif character in "+-*()":
            tokens.append(character)
        elif character != " ":
            raise ExpressionError(f"unexpected {character!r}")
        index = end
    return tokens
