"""Hostile answers are refused without a parser or an evaluation: fractions of a second in this very process."""

from __future__ import annotations

import time

import pytest

from owpo_megatron.types import GradingItem
from owpo_megatron.verifiers.limits import MAX_NESTING, nesting
from owpo_megatron.verifiers.math_answer import MathRule

pytestmark = pytest.mark.process

RULE = MathRule()
RULE.warm()

BOMBS = [
    "9**9**9**9", "9^{9^{9^{9}}}", "2^{10^{9}}", r"7^{7^{7^{7}}} \mod 10", "99999999!", "((20!)!)!", "(9!)!",
    "3!!!!!!!",
    r"\sum_{k=1}^{10^{9}} k^{7}", r"\sum_{n=1}^{\infty} \frac{\sin(n^2)}{n^3}",
    r"\prod_{k=1}^{10^{6}} (1+\frac{1}{k^2})",
    r"\int_0^1 x^{x^{x}} dx", r"\int_0^{\infty} \frac{\sin(x)^{7}\ln(x)}{x^3+e^{x}} dx", "1e999999999", "0.1^{10^{9}}",
    r"(-1)^{\frac{1}{10^{9}}}", r"\sqrt[3]{10^{1000000}+1}", r"\Gamma(10^{9})", r"\zeta(3)^{10^{6}}",
    r"\binom{10^9}{10^8}",
    "(x+y+z+w+v)^{100}", r"\sin(x+1)^{40}-\cos(x-1)^{40}", "x^{100}-1=0", r"\bigcup_{n=1}^{10^{6}} (0,\frac{1}{n})",
    "1+" * 20_000 + "1", "(" * 500 + "43" + ")" * 500, r"\sqrt{1+" * 2000 + "1" + "}" * 2000, "-" * 5000 + "42",
    "0." + "9" * 200_000, r"\text{a}" * 20_000, "^" * 5000 + "2",
    "x" + "_{x" * 1500 + "}" * 1500, "{" * 2000 + "43" + "}" * 2000,
    r"\begin{vmatrix}" + r"\\".join("&".join(f"x_{{{i}{j}}}" for j in range(9)) for i in range(9)) + r"\end{vmatrix}",
    r"\begin{pmatrix}" + r"\\".join("&".join("xyz" for j in range(6)) for i in range(6)) + r"\end{pmatrix}^{50}",
]  # fmt: skip


@pytest.mark.parametrize("answer", BOMBS, ids=range(len(BOMBS)))
def test_a_bomb_is_refused_at_once(answer):
    start = time.process_time()
    reason = RULE(GradingItem(f"The answer is \\boxed{{{answer}}}.", "42"))
    assert reason in ("parse_failed", "too_long", "wrong", "no_answer")
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "gold", ["2^{2023}", "2023!", "10^{100}", r"\sum_{n=1}^{\infty} \frac{1}{n^2}", r"\int_0^1 x^x dx", "(x+y)^{50}"]
)
def test_what_the_gold_answer_has_may_stand(gold):
    """Large values and unevaluated sums are answers where the gold answer is one."""
    assert RULE(GradingItem(f"\\boxed{{{gold} }}", gold)) == "ok"
    assert RULE(GradingItem(f"\\boxed{{{gold} + 0}}", gold)) in ("ok", "parse_failed")


def test_nesting():
    assert nesting("((1))") == 2 and nesting(")(") == 1 and nesting("--1") == 2 and nesting("") == 0
    assert nesting("{" * (MAX_NESTING + 1)) > MAX_NESTING
