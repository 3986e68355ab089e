"""Objectives that couple tokens against numbers worked by hand, and as special cases of each other."""

from __future__ import annotations

import math

import pytest
import torch
from evaluated import Response, evaluate, of_ratio

from owpo_megatron.methods import Method, make_method

LOG = math.log


def responses(drift: float = 0.3, group_size: int = 4) -> list[Response]:
    """Two groups of four, lengths 1 to 4, one sign of A each way."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for index in range(2 * group_size):
        length = 1 + index % 4
        old = (-torch.rand(length, generator=generator).double() * 2 - 0.1).tolist()
        moved = (drift * torch.randn(length, generator=generator).double()).tolist()
        right = index in (0, 3, 5)
        found.append(
            Response(
                [value + by for value, by in zip(old, moved, strict=True)],
                old,
                advantage=1.2 if right else -0.6,
                reward=float(right),
                group=index // group_size,
                entropy=(torch.rand(length, generator=generator).double() * 3).tolist(),
            )
        )
    return found


def same(one: Method, other: Method, found: list[Response]) -> None:
    first, second = evaluate(one, found), evaluate(other, found)
    assert first.loss == pytest.approx(second.loss, rel=1e-12)
    for ours, theirs in zip(first.gradients, second.gradients, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-14)


# ------------------------------------------------------------------------------------------------- a response
def test_gspo_by_hand() -> None:
    # log r = .0002 and .0004: s = e^.0003, inside; value s A per token, gradient s A / 2 of the sample's mean
    one = Response([-0.9998, -1.9996], [-1.0, -2.0], 2.0)
    found = evaluate(make_method("gspo"), [one])
    assert found.loss == pytest.approx(2 * math.exp(3e-4)) and found.gradients[0] == pytest.approx([math.exp(3e-4)] * 2)
    # log r = 0 and .002: s = e^.001, above 1.0004: cut for A > 0, kept for A < 0
    far = Response([-1.0, -1.998], [-1.0, -2.0], 2.0)
    assert evaluate(make_method("gspo"), [far]).loss == pytest.approx(2 * 1.0004)
    assert evaluate(make_method("gspo"), [far]).gradients[0] == [0, 0]
    against = evaluate(make_method("gspo"), [Response(far.now, far.old, -2.0)])
    assert against.gradients[0] == pytest.approx([-math.exp(1e-3)] * 2)


def test_gspo_special_cases() -> None:
    grpo = make_method("grpo", beta=0.0, clip_low=3e-4, clip_high=4e-4)
    same(make_method("gspo"), grpo, responses(drift=0.0))
    single = [one for one in responses() if len(one.now) == 1]
    same(make_method("gspo"), grpo, single)


def test_luspo_is_gspo_times_the_length() -> None:
    ranges = {"clip_low": 0.2, "clip_high": 0.2}
    gspo, luspo = make_method("gspo", **ranges), make_method("luspo", **ranges)
    for one in responses():
        first, second = evaluate(gspo, [one]), evaluate(luspo, [one])
        assert second.loss == pytest.approx(len(one.now) * first.loss)
        assert second.gradients[0] == pytest.approx([len(one.now) * value for value in first.gradients[0]])


def test_gmpo_by_hand() -> None:
    # log r = .2 and .6; A > 0 clips .6 to .4: exp(.3) A; the clipped token has no gradient
    one = Response([-0.8, -1.4], [-1.0, -2.0], 2.0)
    found = evaluate(make_method("gmpo"), [one])
    assert found.loss == pytest.approx(2 * math.exp(0.3))
    assert found.gradients[0] == pytest.approx([math.exp(0.3), 0.0])
    # A < 0: nothing above is clipped: exp(.4) A
    found = evaluate(make_method("gmpo"), [Response(one.now, one.old, -2.0)])
    assert found.loss == pytest.approx(-2 * math.exp(0.4))
    assert found.gradients[0] == pytest.approx([-math.exp(0.4)] * 2)
    # one token: min(r A, clip(r, e^-.4, e^.4) A)
    for ratio in (0.5, 1.1, 2.0):
        for advantage in (1.0, -1.0):
            bounded = min(max(ratio, math.exp(-0.4)), math.exp(0.4))
            value, gradient = of_ratio(make_method("gmpo"), ratio, advantage)
            assert value == pytest.approx(min(ratio * advantage, bounded * advantage))
            assert gradient == pytest.approx(ratio * advantage if ratio * advantage <= bounded * advantage else 0.0)


def test_gmpo_unclipped_is_the_geometric_mean() -> None:
    """Against autograd of exp(mean log r) A, gradients flowing through all tokens."""
    method = make_method("gmpo", clip_low=9.0, clip_high=9.0)
    for one in responses():
        now = torch.tensor(one.now, dtype=torch.float64).requires_grad_()
        value = ((now - torch.tensor(one.old, dtype=torch.float64)).mean()).exp() * one.advantage
        (gradient,) = torch.autograd.grad(value, now)
        found = evaluate(method, [one])
        assert found.loss == pytest.approx(float(value.detach()))
        assert found.gradients[0] == pytest.approx(gradient.tolist())


def test_vespo_weights() -> None:
    method = make_method("vespo")
    assert of_ratio(method, 1.0, 1.5)[1] == pytest.approx(1.5)
    # W = 2, A > 0: 2^2 e^(3 (1 - 2)) = .19915; two tokens of ratio sqrt 2 each
    half = 0.5 * LOG(2)
    found = evaluate(method, [Response([-1 + half, -2 + half], [-1.0, -2.0], 1.0)])
    assert found.gradients[0] == pytest.approx([0.19915, 0.19915], abs=5e-6)
    # A < 0: 2^3 e^(2 (1 - 2)) = 1.08268
    found = evaluate(method, [Response([-1 + half, -2 + half], [-1.0, -2.0], -1.0)])
    assert found.gradients[0] == pytest.approx([-8 * math.exp(-2)] * 2)


def test_off_policy_mask() -> None:
    grpo = make_method("grpo", beta=0.0)
    same(make_method("off_policy_mask", delta=1e6), grpo, responses())
    same(make_method("off_policy_mask"), grpo, responses(drift=0.0))
    # mean of log old - log now: .15 in the first, .05 in the second
    gone = Response([-1.2, -2.1], [-1.0, -2.0], -1.0)
    near = Response([-1.0, -2.1], [-1.0, -2.0], -1.0)
    found = evaluate(make_method("off_policy_mask"), [gone, near, Response(gone.now, gone.old, 1.0)])
    assert found.gradients[0] == [0, 0] and all(found.gradients[1]) and all(found.gradients[2])


# ------------------------------------------------------------------------------------------------- a group
def dense(method: Method, found: list[Response], function) -> None:
    """The method against autograd of the mean over groups of `function(now, old, right)`."""
    groups = sorted({one.group for one in found})
    now = [torch.tensor(one.now, dtype=torch.float64).requires_grad_() for one in found]
    total = torch.zeros((), dtype=torch.float64)
    for number in groups:
        own = [index for index, one in enumerate(found) if one.group == number]
        old = [torch.tensor(found[index].old, dtype=torch.float64) for index in own]
        total = total + function([now[index] for index in own], old, [found[index].reward > 0 for index in own])
    gradients = torch.autograd.grad(total / len(groups), now, allow_unused=True)
    result = evaluate(method, found)
    assert result.loss == pytest.approx(float(total.detach()) / len(groups), rel=1e-10)
    for ours, theirs in zip(result.gradients, gradients, strict=True):
        wanted = torch.zeros(len(ours)).double() if theirs is None else theirs
        assert [one / len(found) for one in ours] == pytest.approx(wanted.tolist(), rel=1e-9, abs=1e-13)


def test_disco_one_right_one_wrong() -> None:
    """s_r - s_w, whatever tau, when the policy has not moved."""
    pair = [Response([-1.0, -2.0], [-1.0, -2.0], reward=1.0), Response([-0.5], [-0.5], reward=0.0)]
    found = evaluate(make_method("disco"), pair)
    assert found.loss == pytest.approx(-1.5 + 0.5)
    # d mean log pi = 1/2 per token; the sum over the 2 responses is divided by 2
    assert [one / 2 for one in found.gradients[0]] == pytest.approx([0.5, 0.5]) and found.gradients[1] == pytest.approx(
        [-2]
    )
    assert evaluate(make_method("disco_ratio"), pair).loss == pytest.approx(1.0 - 1.0)


@pytest.mark.parametrize("name", ["disco", "disco_ratio"])
def test_disco_against_autograd(name: str) -> None:
    tau = 10.0 if name == "disco" else 1.0

    def group(now, old, right):
        log_ratio = torch.cat(now) - torch.cat(old)
        kl = (log_ratio.exp() - 1 - log_ratio).mean()
        score = [n.mean() if name == "disco" else (n - o).exp().mean() for n, o in zip(now, old, strict=True)]
        good = [s for s, r in zip(score, right, strict=True) if r]
        bad = [s for s, r in zip(score, right, strict=True) if not r]
        value = sum(good) / len(good) - tau * (sum((s / tau).exp() for s in bad) / len(bad)).log()
        return value - max(1e3 * (float(kl.detach()) - 1e-4), 0.0) * kl

    dense(make_method(name), responses(), group)


def test_drpo_prefers_short_right_answers() -> None:
    same(make_method("drpo", scale=1e12), make_method("disco"), responses())
    # lengths 1 and 3 of L_max 10, lambda .1: weights e^(-1) and e^(-3) over their sum: .8808 and .1192
    group = [
        Response([-1.0], [-1.0], reward=1.0),
        Response([-2.0] * 3, [-2.0] * 3, reward=1.0),
        Response([-3.0], [-3.0], reward=0.0),
    ]
    share = 1 / (1 + math.exp(-2))
    assert evaluate(make_method("drpo", max_length=10), group).loss == pytest.approx(-share - 2 * (1 - share) + 3)


def test_real_by_hand_and_against_autograd() -> None:
    pair = [Response([-1.0], [-1.0], reward=1.0), Response([-2.0], [-2.0], reward=0.0)]
    found = evaluate(make_method("real"), pair)
    assert found.loss == pytest.approx(-2 * LOG(2))
    # d -log(1 + e^(-s/tau)) = sigma(0) / tau = 1; the divisor is the 2 responses
    assert [one[0] / 2 for one in found.gradients] == pytest.approx([1.0, -1.0])

    def group(now, old, right):
        score = [(n - o).mean() / 0.5 for n, o in zip(now, old, strict=True)]
        good = 1 + sum((-s).exp() for s, r in zip(score, right, strict=True) if r)
        bad = 1 + sum(s.exp() for s, r in zip(score, right, strict=True) if not r)
        return -(good.log() + bad.log())

    dense(make_method("real"), responses(), group)
    same_kind = [Response([-1.0], [-1.2], reward=1.0), Response([-2.0], [-2.1], reward=1.0)]
    assert evaluate(make_method("real"), same_kind).gradients == [[0], [0]]


def test_pacs_by_hand_and_against_autograd() -> None:
    pair = [Response([-1.0], [-1.0], reward=1.0), Response([-2.0], [-2.0], reward=0.0)]
    assert evaluate(make_method("pacs"), pair).loss == pytest.approx(-LOG(2))

    def group(now, old, right):
        score = [(n - o).sum() for n, o in zip(now, old, strict=True)]
        total = 0.0
        for index, (own, label) in enumerate(zip(score, right, strict=True)):
            logit = own - sum(score[:index] + score[index + 1 :]) / (len(score) - 1)
            total = total + torch.nn.functional.logsigmoid(logit if label else -logit)
        return total / len(score)

    dense(make_method("pacs"), responses(), group)
    # group 1 has one right of four: weights 4 / (2 * 1) and 4 / (2 * 3); both classes then weigh 2 of 4
    still = [Response([-1.0], [-1.0], reward=float(index == 0)) for index in range(4)]
    found = evaluate(make_method("pacs", balanced=True), still)
    assert found.loss == pytest.approx(-LOG(2) * (2 + 3 * 2 / 3) / 4)


# ------------------------------------------------------------------------------------------------- a minibatch
def test_entropy_mask() -> None:
    same(make_method("entropy_mask", share=1.0), make_method("dapo"), responses())
    # five tokens of entropy 1..5: the .8 quantile lies at place 3.2: 4.2, so one token is kept
    one = Response([-1.0] * 5, [-1.0] * 5, 1.0, entropy=[3.0, 1.0, 5.0, 2.0, 4.0])
    found = evaluate(make_method("entropy_mask"), [one])
    assert found.gradients[0] == [0, 0, 1, 0, 0] and found.loss == pytest.approx(1 / 5)
    assert evaluate(make_method("entropy_mask", share=0.5), [one]).gradients[0] == [1, 0, 1, 0, 1]


def test_covariance_methods() -> None:
    # A = 3, -1; log pi = -1, -5: means 1 and -3; cov = 2 * 2 and -2 * -2: both 4
    pair = [Response([-1.0], [-1.0], 3.0), Response([-5.0], [-5.0], -1.0)]
    held = evaluate(make_method("clip_cov", share=1.0), pair)
    assert held.gradients == [[0], [0]] and held.loss == 0
    one_of_them = evaluate(make_method("clip_cov"), pair)  # at least one token
    assert sorted(abs(one[0]) > 0 for one in one_of_them.gradients) == [False, True]
    base = make_method("dapo", clip_high=0.2)
    same(make_method("clip_cov", low=50.0, high=60.0), base, responses())
    # KL-Cov: r A, minus abs(log r) on the chosen token; log r = .5 costs .5 and its slope 1
    drifted = [Response([-1.0], [-1.5], 3.0), Response([-5.0], [-5.0], 0.5)]
    found = evaluate(make_method("kl_cov"), drifted)  # cov 1.25 * 2 of both: the first of equals or either one
    plain = evaluate(make_method("kl_cov", beta=0.0), drifted)
    assert plain.gradients[0][0] == pytest.approx(3 * math.exp(0.5)), "no clip"
    assert found.metrics["paying"] == 1
    # a clipped token is no candidate: r = e, A > 0
    clipped = [Response([-1.0], [-2.0], 3.0), Response([-5.0], [-5.0], -1.0)]
    assert evaluate(make_method("clip_cov", share=1.0), clipped).metrics["clip_count"] == 2
    assert evaluate(make_method("clip_cov", share=1.0), clipped).loss == pytest.approx(3 * 1.2 / 2)


def test_kl_cov_pays_on_the_largest() -> None:
    # A = 2, 0, -2; log pi = -1, -2, -4.5 (mean -2.5): cov = 3, 0, 4: the last one pays
    three = [Response([-1.0], [-1.0], 2.0), Response([-2.0], [-2.0], 0.0), Response([-4.5], [-4.0], -2.0)]
    found = evaluate(make_method("kl_cov"), three)
    # r = e^-.5: value -2 r - .5; gradient -2 r + 1 (d abs(log r) / d logp = -1 below)
    assert found.gradients[2][0] == pytest.approx(-2 * math.exp(-0.5) + 1)
    assert found.loss == pytest.approx((2 - 2 * math.exp(-0.5) - 0.5) / 3)


def test_bapo_bounds() -> None:
    method = make_method("bapo")

    def bounds(ratio: list[float], advantage: list[float]) -> tuple[float, float]:
        return method.bounds(torch.tensor(ratio).double(), torch.tensor(advantage).double())  # type: ignore[attr-defined,no-any-return]

    assert bounds([1.0, 1.0], [1.0, -1.0]) == (0.8, 1.2), "met at once: 1 of 1"
    assert bounds([1.0, 1.0], [1.0, 0.0]) == (0.8, 1.2), "no negative contribution"
    assert bounds([1.0, 1.0], [0.1, -1.0]) == pytest.approx((0.95, 2.0)), "hopeless: both at their limits"
    # Raising the lower bound only makes max(r, low) A larger in size, as in the authors' code; then the upper bound
    # counts: positive min(1.3, high), wanted half of 2.55: 1.2 < 1.275 <= 1.3
    assert bounds([1.3, 1.0], [1.0, -2.55]) == pytest.approx((0.95, 1.3))
    # exactly two raises: 1.2 -> 1.25 -> 1.3
    far = [Response([LOG(1.29) - 1], [-1.0], 1.0), Response([-1.0], [-1.0], -2.55)]
    found = evaluate(method, far)
    assert found.gradients[0] == pytest.approx([1.29]), "1.29 is inside 1.3"
    # A met target: the plain clip at .8 and 1.2 with the dual clip at 3
    met = [Response([LOG(1.5) - 1], [-1.0], 1.0), Response([LOG(5) - 3], [-3.0], -0.1)]
    found = evaluate(method, met)
    assert found.gradients == [[0], [0]] and found.loss == pytest.approx((1.2 - 0.3) / 2)


def test_simpo_by_hand_and_against_autograd() -> None:
    # s = -1 and -2: 2 (1) - 1 = 1: log sigma(1); the slope is sigma(-1) beta, each way
    pair = [Response([-1.0], 0.0, reward=1.0), Response([-2.0], 0.0, reward=0.0)]
    found = evaluate(make_method("simpo"), pair)
    assert found.loss == pytest.approx(-LOG(1 + math.exp(-1)))
    slope = 2 / (1 + math.e)
    assert [one[0] / 2 for one in found.gradients] == pytest.approx([slope, -slope])

    def group(now, old, right):
        good = [n.mean() for n, r in zip(now, right, strict=True) if r]
        bad = [n.mean() for n, r in zip(now, right, strict=True) if not r]
        values = [torch.nn.functional.logsigmoid(2 * (g - b) - 1) for g in good for b in bad]
        return sum(values) / len(values)

    dense(make_method("simpo"), responses(), group)
