r"""Extraction and the frame of the mathematics rule. Its equivalence on public suites and hostile answers is not
measured here."""

from __future__ import annotations

import pytest

from owpo_megatron.config import VerifierConfig
from owpo_megatron.types import GradingItem
from owpo_megatron.verifiers import DirectVerifier, VerifierPool, make_verifier
from owpo_megatron.verifiers.extraction import final_answer
from owpo_megatron.verifiers.math_answer import grade_math, normalise


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{17}. Checking again: \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {5}", "5"),
        ("thus\nAnswer: $34$", "$34$"),
        ("**Answer:** 34", "34"),
        ("answer : 5\nAnswer: 6", "6"),
        ("Answer: \\boxed{7}", "7"),
        ("\\boxed{42}\nAnswer: 41", "41"),
        ("Answer: 41\n\\boxed{42}", "42"),
        ("the number 42 is nice", None),
        (r"\boxed{42", None),
        (r"\boxed{17} and \boxed{42", None),
        (r"\boxed{}", None),
        (r"\boxed", None),
        ("Answer:", None),
        ("", None),
        ("Answer: 1" + "\n" * 10_000, None),  # too far from the end
    ],
)
def test_final_answer(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("answer", "plain"),
    [("$34$.", "34"), ("1,234", "1234"), (r"1{,}234", "1234"), (r"\text{ABC}", "ABC"), ("1,2", "1,2"), ("**5**", "5")],
)
def test_normalise(answer, plain):
    assert normalise(answer) == plain


@pytest.mark.parametrize(
    ("response", "gold", "reason"),
    [
        ("Answer: 34", "34", "ok"),
        (r"\boxed{034}", "34", "ok"),
        (r"\boxed{35}", "34", "wrong"),
        (r"\boxed{\frac{2}{4}}", "0.5", "ok"),
        (r"\boxed{x+1}", "1+x", "ok"),
        (r"\boxed{x+1}", "x+2", "wrong"),
        ("34", "34", "no_answer"),
        (r"\boxed{" + "9" * 501 + "}", "9", "too_long"),
    ],
)
def test_the_rule(response, gold, reason):
    assert grade_math(GradingItem(response, gold, "math")) == reason


def test_trivial_domains_need_no_processes():
    assert isinstance(make_verifier(VerifierConfig(), {"cipher", "countdown"}), DirectVerifier)
    assert isinstance(make_verifier(VerifierConfig(rule="cipher"), {"math"}), DirectVerifier)


def test_each_domain_gets_its_rule():
    """`math` and a domain that a file made up go to the rule for mathematics, a task's to its own."""
    verifier = make_verifier(VerifierConfig(workers=1), {"cipher", "math", "algebra"})
    assert isinstance(verifier, VerifierPool)
    items = [
        GradingItem("x0k", "x0k", "cipher"),
        GradingItem("x0k", "x0k", "math"),
        GradingItem("Answer: 2x", "x+x", "algebra"),
    ]
    verdicts = verifier.score(items)
    verifier.close()
    assert [v.reason for v in verdicts] == ["ok", "no_answer", "ok"]
    assert [v.correct for v in verdicts] == [True, False, True]


def test_a_hostile_answer_is_cut_off():
    """A factorial of ten million would take minutes."""
    verifier = make_verifier(VerifierConfig(workers=1, timeout=1.5), {"math"})
    verdicts = verifier.score([GradingItem(r"\boxed{(10^7)!}", "3", "math"), GradingItem("Answer: 3", "3", "math")])
    verifier.close()
    assert [v.reason for v in verdicts] == ["timeout", "ok"]
