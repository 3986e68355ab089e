"""Properties of every input: hypothesis draws responses from unicode, LaTeX fragments and nested structures."""

from __future__ import annotations

import random
from fractions import Fraction
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from owpo_megatron.bench.verifier import _FRAGMENTS, _fuzzed
from owpo_megatron.types import GradingItem, VerdictReason
from owpo_megatron.verifiers import VerifierPool
from owpo_megatron.verifiers.extraction import final_answer
from owpo_megatron.verifiers.math_answer import MathRule
from owpo_megatron.verifiers.rational import compare
from owpo_megatron.verifiers.surface import clean, string_form

TEXT = st.one_of(
    st.text(max_size=200),
    st.lists(st.sampled_from(_FRAGMENTS), max_size=40).map("".join),
    st.recursive(
        st.sampled_from(["1", "x", "42"]), lambda inner: inner.map(lambda text: f"\\frac{{{text}}}{{({text})}}")
    ),
)
NUMBER = st.integers(-(10**9), 10**9)
FAST = settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def pool():
    pool = VerifierPool({"math": MathRule()}, workers=2, timeout=4.0)
    yield pool
    pool.close()


@FAST
@given(TEXT, TEXT)
def test_the_part_in_the_callers_process_never_raises(response, gold):
    reason = MathRule().quick(GradingItem(response, gold))
    assert reason is None or reason in get_args(VerdictReason)
    string_form(clean(response))


@FAST
@given(TEXT)
def test_a_box_behind_anything_is_the_answer(text):
    """The box is found behind any text that neither opens a reasoning without end nor ends the turn."""
    if "<" not in text:
        answer = final_answer(text + " and so, finally, we have the result \\boxed{137}.")
        assert answer == "137" or "boxed{" in text or text.endswith(("$", "\\"))


@FAST
@given(NUMBER, NUMBER)
def test_integers(given_number, gold):
    reason = MathRule().quick(GradingItem(f"\\boxed{{{given_number:,}}}", str(gold)))
    assert reason == ("ok" if given_number == gold else "wrong")


@FAST
@given(NUMBER, st.integers(1, 10**6), st.integers(1, 50))
def test_fractions_in_any_terms(over, under, factor):
    text = f"\\frac{{{over * factor}}}{{{under * factor}}}"
    assert compare(text, str(Fraction(over, under)))
    assert compare(text, str(Fraction(over + 1, under))) is False


@FAST
@given(st.lists(NUMBER, min_size=2, max_size=30, unique=True))
def test_sprays_of_numbers_are_never_right(numbers):
    """Any list that holds the gold number and others, however they are separated, in a box or not."""
    gold = str(numbers[-1])
    for separator in (", ", "; ", " ", r" \text{ or } ", r"\quad "):
        spray = separator.join(map(str, numbers))
        for response in (spray, f"\\boxed{{{spray}}}", f"Answer: {spray}", f"The answer is {spray}."):
            assert MathRule().quick(GradingItem(response, gold)) != "ok"


@pytest.mark.slow
@pytest.mark.process
@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=8))
def test_the_pool_answers_everything_in_order(pool, seeds):
    """Random, broken and nested inputs, each between two answers that are known."""
    items = []
    for seed in seeds:
        items += [GradingItem(f"\\boxed{{x+{seed}}}", f"{seed}+x", "math"), _fuzzed(random.Random(seed))]
    verdicts = pool.score(items)
    assert len(verdicts) == len(items)
    assert all(verdict.reason == "ok" for verdict in verdicts[::2])
    assert all(verdict.reason not in ("timeout", "crashed") for verdict in verdicts)
