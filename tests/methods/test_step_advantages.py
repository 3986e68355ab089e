"""Advantages over a whole step against numbers worked by hand, and as special cases of each other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from owpo_megatron.methods import StepView, make_method


def step(*groups: list[float], lengths: list[int] | None = None, **more: Any) -> StepView:
    rewards = [reward for group in groups for reward in group]
    return StepView(
        reward_N=rewards,
        counts_N=more.pop("counts", [True] * len(rewards)),
        group_N=[index for index, group in enumerate(groups) for _ in group],
        length_N=lengths or [1] * len(rewards),
        prompt_N=[f"p{index}" for index, group in enumerate(groups) for _ in group],
        **more,
    )


def of(name: str, view: StepView, **settings: Any) -> list[float]:
    return [float(one) for one in make_method(name, **settings).advantages(view)]


ONE_OF_FOUR = [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("rloo", {}, [1, -1 / 3, -1 / 3, -1 / 3]),
        ("loop", {}, [1, -1 / 3, -1 / 3, -1 / 3]),  # G/(G-1) (R - 1/4)
        ("maxrl", {}, [3, -1, -1, -1]),
        ("grpo_passk", {}, [2, 0, 0, 0]),  # 1 / (std 1/2)
        ("gpg", {}, [3, -1, -1, -1]),  # 4 responses, 1 of them not 0: alpha 4
        ("opo", {}, [0.75, -0.25, -0.25, -0.25]),
        ("w_reinforce", {}, [0.1, -1, -1, -1]),
        ("w_reinforce", {"right": 1.0}, [1, -1, -1, -1]),
        ("psr", {}, [1, 0, 0, 0]),
        ("nsr", {}, [0, -1, -1, -1]),
        ("pgbc", {"false_positive": 0.0, "false_negative": 0.0}, [0.75, -0.25, -0.25, -0.25]),
        ("pgbc", {"false_positive": 0.1, "false_negative": 0.3}, [0.75 / 0.6, -0.25 / 0.6, -0.25 / 0.6, -0.25 / 0.6]),
        ("pgfc", {"false_negative": 0.3}, [0.3, -0.7, -0.7, -0.7]),
    ],
)
def test_one_right_of_four(name: str, settings: dict, expected: list[float]) -> None:
    assert of(name, step(ONE_OF_FOUR), **settings) == pytest.approx(expected, abs=5e-6)


def test_dr_grpo_is_centred_over_the_constant_length() -> None:
    view = step(ONE_OF_FOUR, lengths=[3, 1, 2, 4], max_length=10)
    assert of("dr_grpo", view) == pytest.approx([0.075, -0.025, -0.025, -0.025])
    assert make_method("dr_grpo").divisor == "sample_sums"
    # rloo = G / (G - 1) of it
    assert of("rloo", view) == pytest.approx([one * 10 * 4 / 3 for one in of("dr_grpo", view)])


def test_samples_that_do_not_count_are_nowhere() -> None:
    """The failed one has reward 9: no mean, no share and no variance knows of it."""
    whole = step([1.0, 0.0, 0.0], [1.0, 1.0, 0.0], lengths=[1, 2, 3, 4, 5, 6], max_length=8)
    more = step([1.0, 0.0, 9.0, 0.0], [1.0, 1.0, 0.0], lengths=[1, 2, 99, 3, 4, 5, 6], max_length=8)
    more = replace(more, counts_N=[True, True, False, True, True, True, True])
    names = ["dr_grpo", "rloo", "maxrl", "gpg", "opo", "psr", "pgbc", "reinforce_pp", "reinforce_pp_baseline", "bnpo"]
    for name in [*names, "canon", "adora", "gdpo", "grpo_passk", "w_reinforce", "nsr", "pgfc", "dcpo_smooth"]:
        kept = of(name, replace(more, memory={}))
        assert [kept[index] for index in (0, 1, 3, 4, 5, 6)] == pytest.approx(of(name, replace(whole, memory={}))), name


def test_groups_of_equal_rewards() -> None:
    view = step([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], max_length=4)
    for name in ("dr_grpo", "rloo", "loop", "maxrl", "grpo_passk", "gpg", "opo", "pgbc"):
        assert of(name, view) == [0.0] * 6, name


def test_reinforce_pp_is_white_over_tokens() -> None:
    lengths = [1, 2, 3, 4, 5, 6, 7, 8]
    view = step(ONE_OF_FOUR, [1.0, 1.0, 0.0, 0.5], lengths=lengths)
    for name in ("reinforce_pp", "reinforce_pp_baseline"):
        found = of(name, view)
        mean = sum(length * one for length, one in zip(lengths, found, strict=True)) / 36
        variance = sum(length * (one - mean) ** 2 for length, one in zip(lengths, found, strict=True)) / 35
        assert mean == pytest.approx(0, abs=1e-12) and variance == pytest.approx(1, rel=1e-6)
    # equal lengths: the z-score over responses, up to tokens - 1 in the place of responses - 1
    equal = of("reinforce_pp", step(ONE_OF_FOUR, lengths=[5] * 4))
    std = math.sqrt(5 * (0.5625 + 3 * 0.0625) / 19)
    assert equal == pytest.approx([0.75 / std, *[-0.25 / std] * 3], rel=1e-6)


def test_gdpo_normalises_each_part() -> None:
    # one part: the whitened z-score
    view = step(ONE_OF_FOUR, [1.0, 1.0, 0.0, 0.0], lengths=[1, 2, 3, 4, 4, 3, 2, 1])
    alone = of("gdpo", view)
    assert sum(length * one for length, one in zip(view.length_N, alone, strict=True)) == pytest.approx(0, abs=1e-9)
    # a part a hundred times as large counts as much as its twin; GRPO's sum would hear of nothing else
    format_part = [0.0, 100.0, 0.0, 0.0, 0.0, 0.0, 0.0, 100.0]
    parts = {"verdict": view.reward_N, "format": format_part}
    both = of("gdpo", replace(view, part_N=parts, weights={"verdict": 1.0, "format": 1.0}))
    assert both[0] == pytest.approx(both[1], rel=1e-4), "one point of each part, equal spreads"
    heavier = of("gdpo", replace(view, part_N=parts, weights={"verdict": 1.0, "format": 2.0}))
    assert heavier[1] > heavier[0]


def test_bnpo_density() -> None:
    from owpo_megatron.methods.advantage.bnpo import Bnpo, fitted

    assert Bnpo().factor(0.3, 1.0, 1.0) == 1
    # Beta(3/2, 3/2) at p is 8/pi sqrt(p (1 - p)): the population std, times 8/pi
    assert Bnpo().factor(0.25, 1.5, 1.5) == pytest.approx(math.pi / 8 / math.sqrt(0.1875))
    assert math.pi / 8 == pytest.approx(0.392699, abs=5e-7)
    # rates 1/4, 3/4: mean 1/2, variance 1/8, a + b = 1, a = b = 1/2: alpha = beta = 7/6
    assert fitted([0.25, 0.75]) == pytest.approx((7 / 6, 7 / 6))
    assert fitted([0.5]) == fitted([0.5, 0.5]) == (1.0, 1.0)
    assert fitted([0.0, 1.0]) == (1.0, 1.0), "variance 1/2 above the Bernoulli's: a, b < 0, kept at 1"
    view = step(ONE_OF_FOUR, [1.0, 1.0, 1.0, 0.0])
    factor = Bnpo().factor(0.25, 7 / 6, 7 / 6)
    assert of("bnpo", view)[:4] == pytest.approx([factor * 0.75, *[-factor * 0.25] * 3])
    assert Bnpo().factor(0.0, 1.5, 1.5) == 1e6, "the density is 0 there"


def test_canon_halves() -> None:
    # by length: (2, R=1), (3, R=0) short; (5, R=1), (7, R=1) long
    view = step([1.0, 1.0, 0.0, 1.0], lengths=[5, 2, 3, 7], max_length=1)
    # against the other half: short - 1, long - 1/2
    assert of("canon", view) == pytest.approx([0.5, 0.0, -1.0, 0.5])
    assert of("canon", view, across=0.0) == pytest.approx([0.0, 0.5, -0.5, 0.0])
    assert of("canon", view, across=0.5) == pytest.approx([0.25, 0.25, -0.75, 0.25]), "R - mean"
    entropies = [torch.full((length,), value) for length, value in zip([5, 2, 3, 7], [1.0, 4.0, 3.0, 2.0], strict=True)]
    # by entropy: the first and the last are the low half
    assert of("canon_entropy", replace(view, entropy_N=entropies)) == pytest.approx([0.5, 0.0, -1.0, 0.5])


def test_opo_weighs_by_length() -> None:
    view = step([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0], lengths=list(range(1, 9)))
    assert of("opo", view)[0] == pytest.approx(1 - 0.13889, abs=5e-6)  # (1 + 4) / 36


def test_adora_discounts_groups_without_longer_right_answers() -> None:
    base = of("adora", step(ONE_OF_FOUR), discount=1.0)
    assert base == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=5e-6), "GRPO's"
    longer = step(ONE_OF_FOUR, lengths=[9, 3, 4, 5])
    assert of("adora", longer) == pytest.approx(base)
    shorter = step(ONE_OF_FOUR, lengths=[4, 3, 4, 5])
    assert of("adora", shorter) == pytest.approx([one / 10 for one in base])
    cut = step(ONE_OF_FOUR, lengths=[4, 3, 4, 5000])
    assert of("adora", cut) == pytest.approx(base), "3.5 without the one that was cut off"


def test_hicra_raises_planning_tokens() -> None:
    pieces = [["let", "'s", " add", " 2"], ["no", "thing"], ["so", " WAIT", "."], ["a"]]
    view = step(ONE_OF_FOUR, lengths=[4, 2, 3, 1], pieces_N=pieces)
    found = [torch.as_tensor(one).tolist() for one in make_method("hicra").advantages(view)]
    high, low = 1.5, -0.5
    assert found[0] == pytest.approx([1.2 * high, 1.2 * high, high, high], abs=5e-6)
    assert found[1] == pytest.approx([low, low], abs=5e-6)
    assert found[2] == pytest.approx([low, 0.8 * low, low], abs=5e-6), "a negative advantage is raised towards 0"
    none = [torch.as_tensor(one).tolist() for one in make_method("hicra", phrases="zebra").advantages(view)]
    assert none[0] == pytest.approx([high] * 4, abs=5e-6)


def test_riskpo_bundles_and_tracked_quantiles() -> None:
    method = make_method("riskpo", bundle=2, rate=0.1)
    assert [method.risk(score, 1, 4) for score in (0, 1, 2.5, 5)] == pytest.approx([-3, 0, 1, 2])  # type: ignore[attr-defined]
    memory: dict[str, Any] = {}
    # two prompts, papers of scores 2, 1, 0: quantiles .4 and 1.6 at levels .2 and .8 of (0, 1, 2); std 1
    view = step([1.0, 1.0, 0.0], [1.0, 0.0, 0.0], memory=memory)
    found = list(method.advantages(view))
    # 2: RVaR 1.2/.6 = 2, /2.5 = .8; 1: .6/.6 = 1, /2.5 = .4; 0: CVaR -.4/.2 = -2, times 1.5, /2.5 = -1.2
    assert found == pytest.approx([0.8, 0.4, -1.2, 0.8, 0.4, -1.2], abs=1e-5)
    # one of three scores is at or below .4, two at or below 1.6
    assert memory == pytest.approx({"lower": 0.4 + 0.1 * (0.2 - 1 / 3), "upper": 1.6 + 0.1 * (0.8 - 2 / 3)})
    again = list(method.advantages(view))
    assert again != found, "the tracked quantiles moved"


def test_dcpo_smooths_over_visits() -> None:
    memory: dict[str, Any] = {}
    first = of("dcpo_smooth", step(ONE_OF_FOUR, memory=memory))
    assert first == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=5e-6), "n = 1: of A_all and A_new, both the z-score"
    assert memory["p0"] == pytest.approx([1, 4, 0.25, 0.75])
    second = of("dcpo_smooth", step([1.0, 1.0, 1.0, 1.0], memory=memory))
    # all: 5 of 8 right, mean .625, squared deviations 5 * .1406 + 3 * .3906 = 1.875, std sqrt(1.875 / 7)
    assert memory["p0"] == pytest.approx([2, 8, 0.625, 1.875])
    over_all = 0.375 / math.sqrt(1.875 / 7)
    assert second == pytest.approx([over_all / 2] * 4, rel=1e-4), "a group of equal verdicts still learns"


def test_noise_corrections_in_expectation() -> None:
    """Enumerate the verifier's answers: expectations 1 for right and 0 for wrong; 0 and -(1 - rho0 - rho1)."""
    rho0, rho1 = 0.2, 0.3
    said = {1.0: {1.0: 1 - rho1, 0.0: rho1}, 0.0: {1.0: rho0, 0.0: 1 - rho0}}
    for truth, chances in said.items():
        corrected = sum(chance * (told - rho0) / (1 - rho0 - rho1) for told, chance in chances.items())
        assert corrected == pytest.approx(truth)
        weights = dict(zip((1.0, 0.0), of("pgfc", step([1.0, 0.0]), false_negative=rho1), strict=True))
        forward = sum(chance * weights[told] for told, chance in chances.items())
        assert forward == pytest.approx(0.0 if truth else -(1 - rho0 - rho1))
