"""The countdown rule against hand-worked cases and a slow evaluator that shares no code with it."""

from __future__ import annotations

import ast
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owpo_megatron.types import GradingItem
from owpo_megatron.verifiers.generated_tasks import (
    ExpressionError,
    evaluate,
    format_answer,
    grade_cipher,
    grade_countdown,
    parse_answer,
)


@pytest.mark.parametrize(
    ("text", "value", "used"),
    [
        ("2*3+7", 13, [2, 3, 7]),
        ("2+3*7", 23, [2, 3, 7]),
        ("(2+3)*7", 35, [2, 3, 7]),
        ("9-4-3", 2, [9, 4, 3]),  # from the left: (9-4)-3, not 9-(4-3) = 8
        ("9-4*2-1", 0, [9, 4, 2, 1]),
        ("2*(9-(4-3))", 16, [2, 9, 4, 3]),
        ("((7))", 7, [7]),
        ("10 * 12", 120, [10, 12]),
        ("0-5", -5, [0, 5]),
        ("0", 0, [0]),
    ],
)
def test_values_by_hand(text, value, used):
    assert evaluate(text) == (value, used)


@pytest.mark.parametrize(
    "text",
    ["", " ", "+", "2+", "+2", "-2", "2++3", "2--3", "2 3", "2(3)", "(2)(3)", "(", ")", "()", "(2", "2)", ")2(",
     "2**3", "2/3", "2.5", "02", "2e3", "1_0", "²", "٣", "2=2", "2\n+3", "2\t+3", "__import__('os')", "x"],
)  # fmt: skip
def test_what_is_no_expression(text):
    with pytest.raises(ExpressionError):
        evaluate(text)


def test_deep_nesting_needs_no_recursion():
    assert evaluate("(" * 100_000 + "5" + ")" * 100_000) == (5, [5])
    with pytest.raises(ExpressionError):
        evaluate("(" * 100_000 + "5" + ")" * 99_999)


def _slow(text):
    """Python's own parser, its tree walked: value and numbers, or None for what is outside the grammar."""
    if re.search(r"(?<![0-9])0[0-9]", text):
        return None  # a leading zero, which Python allows in 00
    try:
        tree = ast.parse(text.strip(" "), mode="eval").body
    except SyntaxError:
        return None

    def walk(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value, [node.value]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
            (left, used), (right, more) = walk(node.left), walk(node.right)
            value = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}[type(node.op)]
            return value, used + more
        raise LookupError

    try:
        return walk(tree)
    except LookupError:
        return None


def _ours(text):
    try:
        return evaluate(text)
    except ExpressionError:
        return None


NUMBERS = st.integers(0, 99).map(str)
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", " + ", "- "]), inner).map("".join),
        inner.map("({})".format),
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(EXPRESSIONS)
def test_expressions_agree_with_the_slow_evaluator(text):
    assert _ours(text) == _slow(text) is not None


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="0123456789+-*() ", max_size=12))
def test_any_text_agrees_with_the_slow_evaluator(text):
    assert _ours(text) == _slow(text)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@settings(max_examples=300, deadline=None)
@given(EXPRESSIONS, st.integers(0, 60), st.sampled_from("0123456789+-*() "))
def test_one_wrong_character_agrees_with_the_slow_evaluator(text, place, character):
    text = text[:place] + character + text[place + 1 :]
    assert _ours(text) == _slow(text)


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("2*3+7", "ok"),
        (" 7 + 3*2 ", "ok"),
        ("(2*3)+7", "ok"),
        ("2*3+8", "wrong"),  # another number
        ("2+3+7", "wrong"),  # 12
        ("13", "wrong"),  # the target itself
        ("2*3+7+2-2", "wrong"),  # the right value by numbers used twice
        ("6+7", "wrong"),  # joined
        ("23-7-3", "wrong"),  # 13, but 23 is no given number
        ("2*3+", "parse_failed"),
        ("2*3+7=13", "parse_failed"),
        ("2*3+7<unused_3>", "parse_failed"),
        ("", "no_answer"),
        ("  ", "no_answer"),
        ("(" * 150 + "2*3+7" + ")" * 150, "too_long"),
    ],
)
def test_the_rule_by_hand(response, reason):
    assert grade_countdown(GradingItem(response, "2,3,7=13", "countdown")) == reason


def test_an_unfinished_response_gives_no_answer():
    assert grade_countdown(GradingItem("2*3+7", "2,3,7=13", truncated=True)) == "no_answer"
    assert grade_cipher(GradingItem("ar9ru", "ar9ru", truncated=True)) == "no_answer"


@given(st.text(max_size=300))
def test_no_response_makes_the_rule_raise(text):
    assert grade_countdown(GradingItem(text, "2,3,7=13")) in ("ok", "wrong", "no_answer", "parse_failed", "too_long")


@given(st.lists(st.integers(0, 99), min_size=1, max_size=6), st.integers(-99, 99))
def test_answers_survive_their_text(numbers, target):
    assert parse_answer(format_answer(numbers, target)) == (numbers, target)


@pytest.mark.parametrize(
    ("response", "reason"),
    [("ar9ru", "ok"), ("ar9r", "wrong"), ("ar9ru ", "wrong"), ("AR9RU", "wrong"), ("", "no_answer")],
)
def test_the_cipher_rule_by_hand(response, reason):
    assert grade_cipher(GradingItem(response, "ar9ru", "cipher")) == reason
