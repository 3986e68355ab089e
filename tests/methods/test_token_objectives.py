"""Objectives of single tokens against numbers worked by hand, and as special cases of each other."""

from __future__ import annotations

import math

import pytest
from evaluated import Response, evaluate, of_ratio

from owpo_megatron.methods import make_method

LOG = math.log


def test_cispo_weighs_and_never_cuts() -> None:
    method = make_method("cispo")
    # inside the cap the gradient is r A; above it cap A, never 0
    assert of_ratio(method, 1.5, 2.0)[1] == pytest.approx(3.0)
    assert of_ratio(method, 7.0, 2.0)[1] == pytest.approx(10.0)
    assert of_ratio(method, 0.1, -2.0)[1] == pytest.approx(-0.2)
    # the other reading, [0.8, 1.2]
    bounded = make_method("cispo", floor=0.8, cap=1.2)
    assert [of_ratio(bounded, r, 1.0)[1] for r in (0.5, 1.1, 2.0)] == pytest.approx([0.8, 1.1, 1.2])
    # value: sg(r) A log pi with log pi = -1 + log 1.5
    assert of_ratio(method, 1.5, 2.0)[0] == pytest.approx(3 * (LOG(1.5) - 1))


def test_sapo_gate() -> None:
    method = make_method("sapo")
    # at r = 1: sigma(0) 4 / tau = 2 / tau, gradient 4 sigma' r A = A for both signs
    assert of_ratio(method, 1.0, 1.0) == pytest.approx((2.0, 1.0))
    assert of_ratio(method, 1.0, -1.0) == pytest.approx((-2 / 1.05, -1.0))

    def slope(r: float, tau: float) -> float:
        gate = 1 / (1 + math.exp(-tau * (r - 1)))
        return 4 * gate * (1 - gate) * r

    # the derivative in r alone is 4 sigma (1 - sigma): 0.98065 at r = 1.28
    assert slope(1.28, 1.0) / 1.28 == pytest.approx(0.98065, abs=5e-6)
    assert of_ratio(method, 1.28, 1.0)[1] == pytest.approx(slope(1.28, 1.0))
    assert of_ratio(method, 1.28, -1.0)[1] == pytest.approx(-slope(1.28, 1.05))


def test_dppo_drops_by_probability() -> None:
    method = make_method("dppo_tv")
    old = LOG(0.5)
    for now, advantage, kept in ((0.71, 1.0, False), (0.69, 1.0, True), (0.29, 1.0, True), (0.29, -1.0, False)):
        value, gradient = of_ratio(method, now / 0.5, advantage, old)
        assert gradient == pytest.approx(now / 0.5 * advantage if kept else 0.0), (now, advantage)
        assert value == pytest.approx(now / 0.5 * advantage * LOG(now) if kept else 0.0)
    # a ratio of 30 for a token of probability .001: kept, and weighs 20
    assert of_ratio(method, 30.0, 1.0, LOG(0.001))[1] == pytest.approx(20.0)


def test_ipo_drops_whichever_way_a_token_moved() -> None:
    """Half of the probability is .1 away at .6 and .4; what is dropped keeps the pull back."""
    old = LOG(0.5)
    for now, advantage, kept in ((0.61, 1.0, False), (0.59, 1.0, True), (0.39, 1.0, False), (0.41, -1.0, True)):
        log_ratio = LOG(now / 0.5)
        value, gradient = of_ratio(make_method("ipo", tau=0.3), now / 0.5, advantage, old)
        assert value == pytest.approx(kept * now / 0.5 * advantage - 0.3 * log_ratio**2), (now, advantage)
        assert gradient == pytest.approx(kept * now / 0.5 * advantage - 0.6 * log_ratio)
    assert of_ratio(make_method("ipo", tau=0.0, delta=1.0), 30.0, 2.0, LOG(0.001)) == pytest.approx((60.0, 60.0))


def test_dppo_kl_of_the_two_outcomes() -> None:
    """old .5, now p: KL = -log 2 - (log p + log(1 - p)) / 2; .2 is crossed between p = .78 and .79."""

    def kl(p: float) -> float:
        return -LOG(2) - (LOG(p) + LOG(1 - p)) / 2

    assert kl(0.78) < 0.2 < kl(0.79)
    method = make_method("dppo_kl")
    assert of_ratio(method, 0.78 / 0.5, 1.0, LOG(0.5))[1] == pytest.approx(1.56)
    assert of_ratio(method, 0.79 / 0.5, 1.0, LOG(0.5))[1] == 0
    assert of_ratio(method, 0.79 / 0.5, -1.0, LOG(0.5))[1] == pytest.approx(-1.58), "it moved against A: kept"
    assert of_ratio(method, 0.21 / 0.5, -1.0, LOG(0.5))[1] == 0


def test_dcpo_bounds() -> None:
    import torch

    method = make_method("dcpo", epsilon_high=0.2)
    low, high = (float(bound) for bound in method.bounds(torch.zeros(1, dtype=torch.float64)))  # type: ignore[attr-defined]
    # q = 1: (1 + sqrt(1 - 0.8)) / 2 and (1 + sqrt(1.8)) / 2
    assert (low, high) == pytest.approx((0.72361, 1.17082), abs=5e-6)
    wide = make_method("dcpo").bounds(torch.tensor([LOG(0.01), LOG(1e-4)], dtype=torch.float64))  # type: ignore[attr-defined]
    assert float(wide[1][0]) == pytest.approx(5.8151, abs=5e-5)
    assert float(wide[1][1]) == 10 and wide[0].tolist() == [0.5, 0.5]
    assert of_ratio(make_method("dcpo"), 5.8, 1.0, LOG(0.01))[1] == pytest.approx(5.8), "PPO would have cut it at 1.2"
    assert of_ratio(make_method("dcpo"), 5.9, 1.0, LOG(0.01))[1] == 0
    assert of_ratio(make_method("dcpo"), 12.0, -1.0, LOG(0.01)) == pytest.approx((-10.0, 0.0))


def test_dro_penalty() -> None:
    # A log pi - beta/2 (log r)^2; at r = 1 the gradient is A, at r = e it is A - beta
    method = make_method("dro", beta=0.4)
    assert of_ratio(method, 1.0, 1.5)[1] == pytest.approx(1.5)
    assert of_ratio(method, math.e, 1.5) == pytest.approx((0.0 - 0.2, 1.1))
    assert of_ratio(make_method("dro", beta=0.0), 3.0, 1.5)[1] == pytest.approx(1.5), "REINFORCE"


def test_topr_tapers_the_negative_ones() -> None:
    method = make_method("topr")
    assert of_ratio(method, 5.0, 1.5)[1] == pytest.approx(1.5), "A > 0: REINFORCE"
    assert [of_ratio(method, r, -2.0)[1] for r in (0.25, 1.0, 5.0)] == pytest.approx([-0.5, -2.0, -2.0])


def test_caps_beyond_the_clip() -> None:
    dapo = make_method("dapo", clip_high=0.2)
    for method in (make_method("dual_clip", cap=1e6), make_method("delta_clip", delta=1e6)):
        for ratio in (0.5, 0.9, 1.1, 4.0):
            for advantage in (1.0, -1.0):
                assert of_ratio(method, ratio, advantage) == pytest.approx(of_ratio(dapo, ratio, advantage))
    # r = 10, A = -1: min(-10, -1.2) = -10, at least -3: loss 3, gradient 0
    assert of_ratio(make_method("dual_clip"), 10.0, -1.0) == pytest.approx((-3.0, 0.0))
    assert of_ratio(make_method("dual_clip"), 2.0, -1.0) == pytest.approx((-2.0, -2.0))
    # min(min(10, 4) A, 1.2 A) = -4
    assert of_ratio(make_method("delta_clip"), 10.0, -1.0) == pytest.approx((-4.0, 0.0))
    assert of_ratio(make_method("delta_clip"), 0.5, -1.0) == pytest.approx((-0.8, 0.0))
    assert of_ratio(make_method("delta_clip"), 10.0, 1.0) == pytest.approx((1.2, 0.0))


def test_entropy_shaped_advantage() -> None:
    method = make_method("entropy_shaped")
    # at r = 1 the gradient is the advantage: -1 + min(.4 H, .5)
    assert of_ratio(method, 1.0, -1.0, entropy=0.5)[1] == pytest.approx(-0.8)
    assert of_ratio(method, 1.0, -1.0, entropy=9.0)[1] == pytest.approx(-0.5)
    for base in (make_method("entropy_shaped", alpha=0.0), method):
        assert of_ratio(base, 1.1, 0.7, entropy=0.0) == pytest.approx(of_ratio(make_method("dapo"), 1.1, 0.7))


@pytest.mark.parametrize(
    "name", ["cispo", "sapo", "dppo_tv", "dppo_kl", "dro", "topr", "dual_clip", "delta_clip", "dcpo"]
)
@pytest.mark.parametrize("advantage", [1.3, -0.7])
def test_without_drift_each_is_the_policy_gradient(name: str, advantage: float) -> None:
    """r = 1: the gradient is A, whatever the method does further away."""
    found = evaluate(make_method(name), [Response([-0.5, -2.0], [-0.5, -2.0], advantage)])
    scale = 2 if make_method(name).divisor == "samples" else 1
    assert [one * scale for one in found.gradients[0]] == pytest.approx([advantage, advantage])
