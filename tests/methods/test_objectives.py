"""Objectives against numbers worked by hand, finite differences and each other.

Not covered here: how the trainer reduces the sums over ranks, and the log-probs themselves.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from coupled_methods import NINE, distinct_objectives
from hypothesis import given, settings
from hypothesis import strategies as st

from owpo_megatron.errors import UserError
from owpo_megatron.methods import catalogue, dense_loss, k3, make_method, token_weights
from owpo_megatron.methods.loss import chunk_batch
from owpo_megatron.types import TokenBatch

METHODS = {one.name: one for one in distinct_objectives() if one.coupling == "token" and not one.needs_entropy}
METHODS |= {name: catalogue()[name]() for name in NINE}
OWPO_FAMILY = [name for name in METHODS if name.startswith("owpo")]


def make_batch(old, ref, advantage, active=None, mask=None, sample=None, dtype=torch.float64):
    def floats(values):
        return torch.as_tensor(values, dtype=dtype)

    count = len(old)
    sample_T = torch.as_tensor(sample if sample is not None else [0] * count)
    return TokenBatch(
        old_logp_T=floats(old),
        ref_logp_T=floats(ref),
        advantage_T=floats(advantage),
        active_T=torch.as_tensor(active if active is not None else [True] * count, dtype=torch.bool),
        mask_T=torch.as_tensor(mask if mask is not None else [True] * count, dtype=torch.bool),
        sample_T=sample_T,
        num_samples=int(sample_T.max()) + 1,
    )


def random_batch(seed, samples=6, dtype=torch.float64):
    """Packed samples of random lengths with prompts in between; zeros where mask is False, as the trainer packs."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count, scale):
        return scale * torch.randn(count, generator=generator, dtype=dtype)

    rows = []
    for index in range(samples):
        prompt, response = (int(torch.randint(1, 5, (), generator=generator)) for _ in range(2))
        mask = torch.tensor([False] * prompt + [True] * response)
        old = -normal(prompt + response, 1.0).abs() - 0.1
        advantage = 0.0 if index == 1 else float(normal(1, 1.0))
        rows.append(
            {
                "old": old * mask,
                "ref": (old + normal(len(mask), 0.2)) * mask,
                "advantage": advantage * mask.to(dtype),
                "active": torch.full_like(mask, index % 3 != 0) & mask,
                "mask": mask,
                "sample": torch.full((len(mask),), index),
                "logp": (old + normal(len(mask), 0.2)) * mask,
            }
        )
    return rows


def pack(rows, dtype=torch.float64):
    """(logp, batch) of these samples, indices starting at 0 as in any microbatch."""
    cat = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    sample = torch.cat([torch.full_like(row["sample"], index) for index, row in enumerate(rows)])
    batch = make_batch(
        cat["old"], cat["ref"], cat["advantage"], cat["active"], cat["mask"], sample.tolist(), dtype=dtype
    )
    return cat["logp"].to(dtype), batch


def loss_and_gradient(objective, logp_T, batch):
    logp_T = logp_T.clone().requires_grad_()
    out = dense_loss(objective, logp_T, batch)
    (gradient,) = torch.autograd.grad(out.loss_sum, logp_T)
    return out, gradient


# --------------------------------------------------------------------------------------------- worked by hand
def test_dapo_by_hand():
    # ratios 1.5, 1.5, 0.5, 0.5, 1.1 with A = 2, -2, 2, -2, 2 and the range [0.8, 1.28]:
    #   A=2,  r=1.5: min(3.0, 2.56) = 2.56, clipped
    #   A=-2, r=1.5: min(-3.0, -2.56) = -3.0
    #   A=2,  r=0.5: min(1.0, 1.6) = 1.0
    #   A=-2, r=0.5: min(-1.0, -1.6) = -1.6, clipped
    #   A=2,  r=1.1: 2.2
    # sum 1.16; the sixth token is masked
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 3.0], dtype=torch.float64)
    batch = make_batch([0.0] * 6, [0.0] * 6, [2, -2, 2, -2, 2, 2], mask=[True] * 5 + [False])
    out, gradient = loss_and_gradient(METHODS["dapo"], ratios.log(), batch)
    assert out.loss_sum.item() == pytest.approx(-1.16, abs=1e-14)
    assert out.count.item() == 5 and not out.count.is_floating_point()
    # d(-r A)/dlogp = -r A where not clipped
    assert gradient.tolist() == pytest.approx([0, 3.0, -1.0, 0, -2.2, 0], abs=1e-14)
    assert out.metrics["clip_count"] == 2
    assert out.metrics["ratio_sum"].item() == pytest.approx(1.5 + 1.5 + 0.5 + 0.5 + 1.1)
    assert "ref_tokens" not in out.metrics and "w_sum" not in out.metrics


def test_owpo_by_hand():
    # old = logp, so r = 1 and the surrogate is A. Log-ratio to the reference, delta, w:
    #   A=1   +0.1  delta +0.1  w = exp(-0.1)   case 1
    #   A=1   -0.1  delta -0.1  w = exp(0.1)    case 2
    #   A=-1  +0.1  delta -0.1  w = exp(0.1)    case 3
    #   A=-1  -0.1  delta +0.1  w = exp(-0.1)   case 4
    #   A=1   +1.0  delta +1.0  w = 0.8 (low)   case 1
    #   A=-1  +1.0  delta -1.0  w = 1.2 (high)  case 3
    #   A=0   +1.0  delta 0     w = 1           no case
    #   A=1   +1.0  inactive    w = 1           not counted
    # sum w A = e^-.1 + e^.1 - e^.1 - e^-.1 + 0.8 - 1.2 + 0 + 1 = 0.6
    log_ratio = [0.1, -0.1, 0.1, -0.1, 1.0, 1.0, 1.0, 1.0]
    advantage = [1, 1, -1, -1, 1, -1, 0, 1]
    logp = torch.full((8,), -2.0, dtype=torch.float64)
    batch = make_batch([-2.0] * 8, [-2.0 - x for x in log_ratio], advantage, active=[True] * 7 + [False])
    out, gradient = loss_and_gradient(METHODS["owpo"], logp, batch)
    small, big = math.exp(-0.1), math.exp(0.1)
    assert out.loss_sum.item() == pytest.approx(-0.6, abs=1e-14)
    assert gradient.tolist() == pytest.approx([-small, -big, big, small, -0.8, 1.2, 0, -1], abs=1e-14)
    metrics = {name: value.tolist() for name, value in out.metrics.items()}
    assert [metrics[f"case_{i}"] for i in (1, 2, 3, 4)] == [2, 1, 2, 1]
    assert (metrics["tokens"], metrics["ref_tokens"], metrics["active_tokens"]) == (8, 7, 7)
    assert (metrics["w_at_low"], metrics["w_at_high"], metrics["reversed_count"]) == (1, 1, 0)
    assert metrics["w_sum"] == pytest.approx(2 * small + 2 * big + 0.8 + 1.2 + 1 + 1)
    assert metrics["kl_ref_sum"] == pytest.approx(3.0)
    assert metrics["abs_log_ratio_sum"] == pytest.approx(3.4)
    assert metrics["abs_delta_sum"] == pytest.approx(2.4)  # without the token whose A is 0
    # bins of 1/16 from -0.5: -0.1 -> floor(0.4 * 16) = 6, +0.1 -> floor(0.6 * 16) = 9, -1 -> 0, +1 -> 15
    histogram = [0.0] * 16
    histogram[6], histogram[9], histogram[0], histogram[15] = 2, 2, 1, 1
    assert metrics["delta_hist"] == histogram


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # delta = +0.1, -0.1, +1, -1
        ("owpo", [math.exp(-0.1), math.exp(0.1), 0.8, 1.2]),
        ("owpo_no_asym", [math.exp(-0.1), math.exp(-0.1), 0.8, 0.8]),
        ("owpo_no_locking", [1, math.exp(0.1), 1, 1.2]),
        ("owpo_no_accel", [math.exp(-0.1), 1, 0.8, 1]),
    ],
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ablations_by_hand(name, expected, sign):
    delta = torch.tensor([0.1, -0.1, 1.0, -1.0], dtype=torch.float64)
    logp = torch.full((4,), -2.0, dtype=torch.float64)
    batch = make_batch(logp, logp - sign * delta, [sign] * 4)
    weights = METHODS[name].weights(logp, chunk_batch(batch, slice(None), logp))
    assert weights.tolist() == pytest.approx(expected, abs=1e-14)


def test_grpo_and_sym_dapo_by_hand():
    # sample 0: two tokens, sample 1: one token, sample 2: no response token at all
    # r = 1, A = 1, 1 | -1; ref - logp = 0.5, 0 | -0.5; k3(x) = e^x - x - 1
    # token values with beta 0.1: 1 - 0.1 k3(0.5), 1, -1 - 0.1 k3(-0.5)
    up, down = math.exp(0.5) - 1.5, math.exp(-0.5) - 0.5
    logp = torch.tensor([-1.0, -1.0, 0.0, -1.0, 0.0], dtype=torch.float64)
    batch = make_batch(
        logp,
        [-0.5, -1.0, 0.0, -1.5, 0.0],
        [1, 1, 0, -1, 0],
        mask=[True, True, False, True, False],
        sample=[0, 0, 1, 1, 2],
    )
    values = [1 - 0.1 * up, 1.0, -1 - 0.1 * down]
    sym = dense_loss(make_method("sym_dapo", beta=0.1), logp, batch)
    assert sym.loss_sum.item() == pytest.approx(-sum(values), abs=1e-14) and sym.count == 3
    grpo, gradient = loss_and_gradient(make_method("grpo", beta=0.1), logp, batch)
    assert grpo.loss_sum.item() == pytest.approx(-((values[0] + values[1]) / 2 + values[2]), abs=1e-14)
    assert grpo.count == 2  # the sample without response tokens is not counted
    # d value / dlogp = A - beta (1 - exp(ref - logp)), halved for the two tokens of sample 0
    slopes = [1 - 0.1 * (1 - math.exp(0.5)), 1.0, -1 - 0.1 * (1 - math.exp(-0.5))]
    assert gradient.tolist() == pytest.approx([-slopes[0] / 2, -slopes[1] / 2, 0, -slopes[2], 0], abs=1e-14)


def test_distillation_by_hand():
    # r = 1, 1, 2 (dropped); ref - logp = 0.3, -0.2, 5; A = 0.1; alpha 5 adds 0.5
    # opd push: 0.3, -0.2, 0; mopd push: 0.8, 0.3, 0; one sample of three tokens
    logp = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64)
    batch = make_batch([-1.0, -1.0, -1.0 - math.log(2)], [-0.7, -1.2, 4.0], [0.1] * 3)
    for name, push in (("opd", [0.3, -0.2, 0]), ("mopd", [0.8, 0.3, 0])):
        out, gradient = loss_and_gradient(METHODS[name], logp, batch)
        assert gradient.tolist() == pytest.approx([-x / 3 for x in push], abs=1e-14)
        assert out.count == 1 and out.metrics["clip_count"] == 1
    # opd lowers the second token against A > 0; mopd with alpha 5 does not
    assert dense_loss(METHODS["opd"], logp, batch).metrics["reversed_count"] == 1
    assert dense_loss(METHODS["mopd"], logp, batch).metrics["reversed_count"] == 0


def test_force_reversal_is_counted():
    """Paper, section 4: the symmetric penalty flips the update where its pull exceeds |A|; OWPO never does."""
    logp = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    # log-ratio 2: pull = beta (1 - exp(-2)) = 0.86 beta against A = 0.5: reversed for beta 1, not for beta 0.1
    batch = make_batch(logp, [-3.0, -3.0], [0.5, -0.5])
    assert dense_loss(make_method("sym_dapo", beta=1.0), logp, batch).metrics["reversed_count"] == 1
    assert dense_loss(make_method("sym_dapo", beta=0.1), logp, batch).metrics["reversed_count"] == 0
    assert dense_loss(METHODS["owpo"], logp, batch).metrics["reversed_count"] == 0


# --------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("name", ["dapo", "grpo", "sym_dapo"])
def test_gradient_by_finite_differences(name):
    objective = METHODS[name]
    logp, batch = pack(random_batch(3))
    _, gradient = loss_and_gradient(objective, logp, batch)
    assert gradient.abs().sum() > 0
    step = 1e-6
    for token in range(len(logp)):
        shift = torch.zeros_like(logp)
        shift[token] = step
        above, below = (dense_loss(objective, logp + sign * shift, batch).loss_sum for sign in (1, -1))
        slope = (above - below) / (2 * step)
        assert gradient[token].item() == pytest.approx(slope.item(), abs=1e-8)


@pytest.mark.parametrize("name", OWPO_FAMILY)
def test_owpo_gradient_is_w_times_dapos(name):
    """Finite differences with w frozen: no gradient flows through w."""
    objective = METHODS[name]
    logp, batch = pack(random_batch(4))
    _, gradient = loss_and_gradient(objective, logp, batch)
    weight_T = objective.weights(logp.clone().requires_grad_(), chunk_batch(batch, slice(None), logp))
    assert not weight_T.requires_grad
    dapo, step = METHODS["dapo"], 1e-6
    for token in range(len(logp)):
        shift = torch.zeros_like(logp)
        shift[token] = step
        above, below = (dense_loss(dapo, logp + sign * shift, batch).loss_sum for sign in (1, -1))
        slope = (above - below) / (2 * step)
        assert gradient[token].item() == pytest.approx(weight_T[token].item() * slope.item(), abs=1e-8)


@pytest.mark.parametrize("name", ["opd", "mopd"])
def test_distillation_gradient_is_the_reported_push(name):
    """Its loss is not the integral of its gradient, so there is nothing to differentiate numerically."""
    logp, batch = pack(random_batch(5))
    out, gradient = loss_and_gradient(METHODS[name], logp, batch)
    alpha = getattr(METHODS[name], "alpha", 0.0)
    ratio = torch.exp(logp - batch.old_logp_T)
    keep = (ratio >= 0.8) & (ratio <= 1.28) & batch.mask_T
    assert 0 < keep.sum() < batch.mask_T.sum()
    lengths = torch.stack([(batch.mask_T & (batch.sample_T == s)).sum() for s in range(batch.num_samples)])
    push = ratio * (batch.ref_logp_T - logp + alpha * batch.advantage_T) * keep
    torch.testing.assert_close(gradient, -push / lengths[batch.sample_T], rtol=1e-13, atol=1e-15)


# --------------------------------------------------------------------------------------------- properties
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OWPO_FAMILY)
@pytest.mark.parametrize("case", ["just_swapped", "none_active"])
def test_w_of_one_equals_dapo_bitwise(name, case, dtype):
    logp, batch = pack(random_batch(7, samples=40, dtype=dtype), dtype)
    if case == "just_swapped":
        batch = dataclasses.replace(batch, ref_logp_T=logp.clone(), active_T=batch.mask_T)
    else:
        batch = dataclasses.replace(batch, active_T=torch.zeros_like(batch.mask_T))
    owpo, owpo_gradient = loss_and_gradient(METHODS[name], logp, batch)
    dapo, dapo_gradient = loss_and_gradient(METHODS["dapo"], logp, batch)
    assert torch.equal(METHODS[name].weights(logp, chunk_batch(batch, slice(None), logp)), torch.ones_like(logp))
    assert torch.equal(owpo.loss_sum, dapo.loss_sum)
    assert torch.equal(owpo_gradient, dapo_gradient)
    assert owpo.metrics["w_sum"] == owpo.metrics["tokens"]


def test_inactive_tokens_do_not_read_the_reference():
    """Their reference pass is not run: the values there change nothing."""
    logp, batch = pack(random_batch(8))
    garbage = torch.where(batch.active_T, batch.ref_logp_T, torch.full_like(logp, float("nan")))
    clean, clean_gradient = loss_and_gradient(METHODS["owpo"], logp, batch)
    dirty, dirty_gradient = loss_and_gradient(METHODS["owpo"], logp, dataclasses.replace(batch, ref_logp_T=garbage))
    assert torch.equal(clean.loss_sum, dirty.loss_sum) and torch.equal(clean_gradient, dirty_gradient)
    for metric, value in clean.metrics.items():
        assert torch.equal(value, dirty.metrics[metric]), metric


finite = st.floats(-30, 30)


@given(st.lists(st.tuples(finite, finite, st.floats(-5, 5), st.booleans()), min_size=1, max_size=20))
@settings(deadline=None, max_examples=200)
def test_weights_stay_in_their_window(tokens):
    logp, ref, advantage, active = (torch.tensor(column) for column in zip(*tokens, strict=True))
    weight = token_weights(logp, ref, advantage, active)
    low, high = torch.tensor(0.8), torch.tensor(1.2)
    assert ((weight >= low) & (weight <= high)).all()
    assert (weight[~active] == 1).all() and (weight[advantage == 0] == 1).all() and (weight[logp == ref] == 1).all()
    delta = torch.sign(advantage) * (logp - ref)
    assert (weight[(delta < 0) & active] >= 1).all() and (weight[(delta > 0) & active] <= 1).all()


@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=50)
def test_no_token_is_reversed(seed):
    """Paper, Proposition 4.2 (i): the sign of every token's gradient is DAPO's, for the ablations too."""
    logp, batch = pack(random_batch(seed))
    _, dapo = loss_and_gradient(METHODS["dapo"], logp, batch)
    for name in OWPO_FAMILY:
        out, gradient = loss_and_gradient(METHODS[name], logp, batch)
        assert torch.equal(torch.sign(gradient), torch.sign(dapo)), name
        assert out.metrics["reversed_count"] == 0


@given(st.integers(0, 2**31), st.lists(st.integers(1, 5), max_size=3))
@settings(deadline=None, max_examples=25)
def test_sums_do_not_depend_on_microbatches(seed, cuts):
    rows = random_batch(seed)
    whole_logp, whole_batch = pack(rows)
    edges = [0, *sorted(set(cuts)), len(rows)]
    for name, objective in METHODS.items():
        whole, whole_gradient = loss_and_gradient(objective, whole_logp, whole_batch)
        parts = [
            loss_and_gradient(objective, *pack(rows[start:stop])) for start, stop in zip(edges, edges[1:], strict=False)
        ]
        total = sum(out.loss_sum for out, _ in parts)
        torch.testing.assert_close(total, whole.loss_sum, rtol=1e-12, atol=1e-13, msg=name)
        assert sum(out.count for out, _ in parts) == whole.count
        # a sigmoid or a root may differ in its last bit between the vector unit and the scalar rest
        gradients = torch.cat([gradient for _, gradient in parts])
        torch.testing.assert_close(gradients, whole_gradient, rtol=1e-14, atol=0, msg=name)
        assert name not in NINE or torch.equal(gradients, whole_gradient), name
        for metric, value in whole.metrics.items():
            summed = sum(out.metrics[metric] for out, _ in parts)
            torch.testing.assert_close(summed, value, rtol=1e-12, atol=1e-13, msg=f"{name} {metric}")


@given(st.integers(0, 2**31))
@settings(deadline=None, max_examples=25)
def test_counts_add_up(seed):
    logp, batch = pack(random_batch(seed))
    for name in OWPO_FAMILY:
        metrics = dense_loss(METHODS[name], logp, batch).metrics
        counted = batch.mask_T & batch.active_T & (batch.advantage_T != 0)
        deviating = counted & (logp != batch.ref_logp_T)
        assert sum(metrics[f"case_{i}"] for i in (1, 2, 3, 4)) == deviating.sum()
        assert metrics["delta_hist"].sum() == counted.sum()
        assert metrics["active_tokens"] == (batch.mask_T & batch.active_T).sum()
        assert all(value.dtype == torch.float64 and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", list(METHODS))
def test_masked_tokens_do_not_count(name):
    """Including a sample index that lies outside the microbatch, as padding may carry."""
    logp, batch = pack(random_batch(11))
    out, gradient = loss_and_gradient(METHODS[name], logp, batch)
    noise = torch.where(batch.mask_T, torch.zeros_like(logp), torch.full_like(logp, -0.7))
    dirty = dataclasses.replace(
        batch,
        old_logp_T=batch.old_logp_T + 2 * noise,
        ref_logp_T=batch.ref_logp_T - noise,
        advantage_T=batch.advantage_T + noise,
        active_T=batch.active_T | ~batch.mask_T,
        sample_T=batch.sample_T.masked_fill(~batch.mask_T, 10_000),
    )
    again, again_gradient = loss_and_gradient(METHODS[name], logp + noise, dirty)
    assert torch.equal(out.loss_sum, again.loss_sum) and torch.equal(gradient, again_gradient)
    assert torch.equal(out.count, again.count)
    for metric, value in out.metrics.items():
        assert torch.equal(value, again.metrics[metric]), metric


@pytest.mark.parametrize("name", list(METHODS))
def test_a_microbatch_without_response_tokens_is_zero(name):
    batch = make_batch([0.0] * 3, [0.0] * 3, [0.0] * 3, mask=[False] * 3)
    out, gradient = loss_and_gradient(METHODS[name], torch.zeros(3, dtype=torch.float64), batch)
    assert out.loss_sum == 0 and out.count == 0 and not gradient.any()


def test_special_cases_of_one_method_are_another():
    logp, batch = pack(random_batch(12))
    dapo, dapo_gradient = loss_and_gradient(METHODS["dapo"], logp, batch)
    unread = dataclasses.replace(batch, ref_logp_T=torch.full_like(logp, float("nan")))
    no_penalty, gradient = loss_and_gradient(make_method("sym_dapo", beta=0.0), logp, unread)
    assert torch.equal(no_penalty.loss_sum, dapo.loss_sum) and torch.equal(gradient, dapo_gradient)
    no_window, gradient = loss_and_gradient(make_method("owpo", weight_low=1.0, weight_high=1.0), logp, batch)
    assert torch.equal(no_window.loss_sum, dapo.loss_sum) and torch.equal(gradient, dapo_gradient)
    opd, opd_gradient = loss_and_gradient(METHODS["opd"], logp, batch)
    mopd, mopd_gradient = loss_and_gradient(make_method("mopd", alpha=0.0), logp, batch)
    assert torch.equal(opd.loss_sum, mopd.loss_sum) and torch.equal(opd_gradient, mopd_gradient)


def test_k3_is_non_negative_and_zero_at_equality():
    logp = torch.linspace(-4, -0.1, 40, dtype=torch.float64)
    assert torch.equal(k3(logp, logp), torch.zeros_like(logp))
    assert (k3(logp, logp.flip(0)) >= 0).all()


# --------------------------------------------------------------------------------------------- declarations
def test_what_each_method_needs():
    needs = {name: (METHODS[name].needs_reference, METHODS[name].dynamic_sampling) for name in NINE}
    assert needs == {name: ("active", True) for name in OWPO_FAMILY} | {
        "dapo": ("none", True),
        "sym_dapo": ("all", True),
        "grpo": ("all", False),
        "opd": ("teacher", False),
        "mopd": ("teacher", False),
    }
    assert all(METHODS[name].needs_old for name in NINE)
    assert make_method("grpo", beta=0.0).needs_reference == "none"


def test_overrides():
    assert make_method("mopd", alpha=0.5, clip_low=0.1) == dataclasses.replace(METHODS["mopd"], alpha=0.5, clip_low=0.1)
    assert make_method("owpo") == METHODS["owpo"]
    with pytest.raises(UserError, match="algorithm.beta = 0.1: owpo has no beta; .* use one of .*grpo, .*sym"):
        make_method("owpo", beta=0.1)
    with pytest.raises(UserError, match="algorithm.name = ppo: (did you mean .*)?use one of .*dapo, .*grpo, "):
        make_method("ppo")
