"""The audit of a verifier: what is counted, that verdicts stay the first rule's, and that the rates are recovered."""

from __future__ import annotations

import random

import pytest

from owpo_megatron.config import VerifierConfig
from owpo_megatron.types import GradingItem, Verdict, VerdictReason
from owpo_megatron.verifiers.audit import AuditedVerifier, ErrorRate, error_rates
from owpo_megatron.verifiers.build import DirectVerifier, make_audited, make_verifier

ITEMS = [GradingItem(f"{index}", "yes" if index % 2 else "no", "default") for index in range(4000)]


def truth(item: GradingItem) -> VerdictReason:
    return "ok" if item.answer == "yes" else "wrong"


def noisy(item: GradingItem) -> VerdictReason:
    """Accepts a tenth of the wrong ones and rejects a fifth of the right ones."""
    turned = random.Random(item.response).random() < (0.2 if item.answer == "yes" else 0.1)
    return "ok" if (item.answer == "yes") != turned else "wrong"


def audited(share: float, seed: int = 1) -> AuditedVerifier:
    return AuditedVerifier(DirectVerifier({"default": noisy}), DirectVerifier({"default": truth}), share, seed)


def test_verdicts_are_the_first_rules() -> None:
    assert [one.reason for one in audited(0.5).score(ITEMS)] == [noisy(item) for item in ITEMS]


def test_the_rates_are_recovered_within_their_intervals() -> None:
    verifier = audited(0.5)
    verifier.score(ITEMS[:2000])
    first = verifier.taken()
    verifier.score(ITEMS[2000:])
    rates = error_rates([{"audit": first}, {"step": 3}, {"audit": verifier.taken()}])
    assert rates["false_positive"].low < 0.1 < rates["false_positive"].high
    assert rates["false_negative"].low < 0.2 < rates["false_negative"].high
    assert 1700 < rates["false_positive"].count + rates["false_negative"].count < 2300
    assert verifier.taken() == dict.fromkeys(("right", "rejected", "wrong", "accepted"), 0)


def test_by_hand() -> None:
    """Truth: three right, two wrong; one right rejected, one wrong accepted; a crash on either side counts nowhere."""
    verifier = audited(1.0)
    ok, no, crash = Verdict(True, "ok"), Verdict(False, "wrong"), Verdict(False, "crashed")
    for pair in ((ok, ok), (ok, ok), (no, ok), (ok, no), (no, no), (crash, ok), (ok, crash)):
        verifier.note(*pair)
    assert verifier.taken() == {"right": 3, "rejected": 1, "wrong": 2, "accepted": 1}


def test_the_choice_depends_on_seed_and_texts_alone() -> None:
    chosen = [audited(0.1).audits(item) for item in ITEMS]
    assert chosen == [audited(0.1).audits(item) for item in ITEMS] != [audited(0.1, 2).audits(item) for item in ITEMS]
    assert 300 < sum(chosen) < 500


def test_wilsons_interval() -> None:
    """10 of 100: 0.0552 to 0.1744 (Wilson 1927). Nothing seen: nothing known."""
    rate = ErrorRate.of(10, 100)
    assert (rate.value, rate.low, rate.high) == pytest.approx((0.1, 0.0552, 0.1744), abs=1e-4)
    assert ErrorRate.of(0, 0) == ErrorRate(0.0, 0.0, 1.0, 0)


def test_a_configuration_with_an_audit() -> None:
    config = VerifierConfig(rule="dapo", audit="cipher", audit_share=1.0)
    verifier = make_audited(make_verifier(config, ["math"]), config, ["math"], seed=1)
    verdicts = verifier.score([GradingItem("Answer: x0k", "x0k", "math"), GradingItem("x0k", "x0k", "math")])
    assert [one.correct for one in verdicts] == [True, False]
    assert verifier.taken() == {"right": 1, "rejected": 1, "wrong": 1, "accepted": 1}
    verifier.close()
