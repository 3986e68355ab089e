"""Results that the paper proves, as properties of the code: Lemma 4.1, Proposition 4.2, Corollary 4.3, Figure 3.

Source: One-Way Policy Optimization for Self-Evolving LLMs (arXiv:2605.22156), section 4 and appendix A. The statements
below are in this project's words. All of them are about the start of an update, where the ratio is 1.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owpo_megatron.methods import dense_loss, effective_progress, make_method
from owpo_megatron.types import TokenBatch

bounds = st.tuples(st.floats(0.01, 0.999), st.floats(1.001, 20.0))
# Below 1e-9 exp(-delta) and 1 may be the same number.
deviations = st.lists(
    st.floats(1e-9, 40.0).flatmap(lambda size: st.sampled_from([size, -size])), min_size=1, max_size=30
)
advantages = st.floats(1e-3, 10.0).flatmap(lambda size: st.sampled_from([size, -size]))


def progress(name: str, delta: list[float], advantage: float, **changed: float) -> torch.Tensor:
    return effective_progress(make_method(name, **changed), torch.tensor(delta, dtype=torch.float64), advantage)


@given(bounds, deviations, advantages)
@settings(deadline=None, max_examples=150)
def test_proposition_4_2(window: tuple[float, float], delta: list[float], advantage: float) -> None:
    """The reference never turns an update around, and treats the two sides unequally.

    (i) Whatever the deviation, the push keeps the verifier's sign and at least weight_low of its size.
    (ii) Behind the reference it is larger than without one; ahead of it smaller, but not below weight_low.
    """
    low, high = window
    g = progress("owpo", delta, advantage, weight_low=low, weight_high=high).tolist()
    for one, value in zip(delta, g, strict=True):
        rounded = 1e-12 * abs(value)
        assert value >= low - rounded > 0
        if one < 0:
            assert 1 < value <= high + rounded
        else:
            assert low - rounded <= value < 1
    at_reference = progress("owpo", [0.0], advantage, weight_low=low, weight_high=high)
    assert at_reference.item() == pytest.approx(1, abs=1e-14)


@given(deviations, advantages)
@settings(deadline=None, max_examples=60)
def test_each_ablation_gives_up_its_part_of_proposition_4_2(delta: list[float], advantage: float) -> None:
    """None is ever reversed (i); without its idea a method does not have the half of (ii) that the idea is."""
    for name in ("owpo_no_asym", "owpo_no_locking", "owpo_no_accel"):
        for one, value in zip(delta, progress(name, delta, advantage).tolist(), strict=True):
            assert 0.8 - 1e-12 <= value <= 1.2 + 1e-12
            if name == "owpo_no_asym":
                assert value < 1, "slower on both sides"
            elif (one > 0) == (name == "owpo_no_locking"):
                assert value == pytest.approx(1, abs=1e-14)
            else:
                assert (value > 1) == (one < 0)


tokens = st.lists(
    st.tuples(st.floats(-3, 3), st.floats(-5, 5), st.integers(0, 4)), min_size=2, max_size=12
)  # (log-ratio to the reference, A, the token drawn)


@given(bounds, tokens, st.integers(0, 2**31))
@settings(deadline=None, max_examples=80)
def test_corollary_4_3(window: tuple[float, float], drawn: list[tuple[float, float, int]], seed: int) -> None:
    """The second moment of the gradient of a softmax policy's parameters stays within weight_low^2 and weight_high^2
    times that without a reference; over the tokens that are ahead of the reference it does not grow."""
    low, high = window
    generator = torch.Generator().manual_seed(seed)
    logits_TV = torch.randn(len(drawn), 5, generator=generator, dtype=torch.float64)
    choice_T = torch.tensor([token for _, _, token in drawn])
    logp_TV = logits_TV.log_softmax(dim=1)
    logp_T = logp_TV.gather(1, choice_T[:, None])[:, 0]
    log_ratio_T = torch.tensor([ratio for ratio, _, _ in drawn], dtype=torch.float64)
    advantage_T = torch.tensor([advantage for _, advantage, _ in drawn], dtype=torch.float64)
    every_T = torch.ones(len(drawn), dtype=torch.bool)
    batch = TokenBatch(
        logp_T, logp_T - log_ratio_T, advantage_T, every_T, every_T, torch.zeros_like(choice_T), num_samples=1
    )

    def squares(name: str, **changed: float) -> torch.Tensor:
        """|| d loss / d logits ||^2 of every token."""
        leaf_T = logp_T.clone().requires_grad_()
        (slope_T,) = torch.autograd.grad(dense_loss(make_method(name, **changed), leaf_T, batch).loss_sum, leaf_T)
        jacobian_TV = torch.nn.functional.one_hot(choice_T, 5) - logp_TV.exp()
        return (slope_T[:, None] * jacobian_TV).square().sum(dim=1)

    plain_T = squares("dapo")
    weighted_T = squares("owpo", weight_low=low, weight_high=high)
    plain, weighted, slack = plain_T.mean(), weighted_T.mean(), 1e-12 * (1 + high**2) * plain_T.mean()
    assert low**2 * plain - slack <= weighted <= high**2 * plain + slack
    ahead_T = torch.sign(advantage_T) * log_ratio_T > 0
    assert weighted_T[ahead_T].sum() <= plain_T[ahead_T].sum() * (1 + 1e-12)


def potential(delta_T: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """psi(delta), the integral of w(u) - 1 from 0: 1 - exp(-delta) - delta inside the window, straight outside."""
    start, end = -math.log(high), -math.log(low)
    inside_T = delta_T.clamp(start, end)
    outside_T = (delta_T - end).clamp(min=0) * (low - 1) + (delta_T - start).clamp(max=0) * (high - 1)
    return 1 - torch.exp(-inside_T) - inside_T + outside_T


@given(bounds, deviations, advantages)
@settings(deadline=None, max_examples=60)
def test_lemma_4_1(window: tuple[float, float], delta: list[float], advantage: float) -> None:
    """OWPO's update is that of the plain policy gradient plus a potential |A| psi(delta) which knows the direction."""
    low, high = window
    logp_T = torch.full((len(delta),), -1.0, dtype=torch.float64, requires_grad=True)
    sign = math.copysign(1.0, advantage)
    ref_T = logp_T.detach() - sign * torch.tensor(delta, dtype=torch.float64)
    regularised = advantage * logp_T + abs(advantage) * potential(sign * (logp_T - ref_T), low, high)
    (slope_T,) = torch.autograd.grad(regularised.sum(), logp_T)
    g = progress("owpo", delta, advantage, weight_low=low, weight_high=high)
    at_kink = [min(abs(one + math.log(high)), abs(one + math.log(low))) < 1e-9 for one in delta]
    for found, expected, kink in zip(slope_T.tolist(), (g * advantage).tolist(), at_kink, strict=True):
        assert kink or found == pytest.approx(expected, rel=1e-9)


@given(st.floats(0.05, 5.0), st.floats(0.05, 5.0))
@settings(deadline=None, max_examples=60)
def test_a_symmetric_penalty_reverses_beyond_its_threshold(beta: float, size: float) -> None:
    """Section 4: near the reference the penalised push is 1 - beta delta / |A|. The k3 penalty turns the update around
    where beta |1 - exp(-log-ratio)| exceeds |A|: for A < 0 beyond ln(1 + |A| / beta), for A > 0 only if beta > |A|."""
    near = 1e-6
    for advantage in (size, -size):
        g = progress("sym_dapo", [near, -near], advantage, beta=beta)
        assert g.tolist() == pytest.approx(
            [1 - beta * near / size, 1 + beta * near / size], abs=1e-10 * (1 + beta / size)
        )
    threshold = math.log1p(size / beta)
    g = progress("sym_dapo", [threshold * 1.01, threshold * 0.99], -size, beta=beta)
    assert g[0] < 0 < g[1]
    assert (progress("sym_dapo", [40.0], size, beta=beta).item() < 0) == (beta > size)


def test_figure_3_is_made_of_these_curves(tmp_path) -> None:
    """The drawn curves at hand-worked places, and the file."""
    from owpo_megatron.cli.methods import dynamics
    from owpo_megatron.report.dynamics import draw_dynamics

    curves = dynamics(points=5, window=1.2)  # delta = -1.2, -0.6, 0, 0.6, 1.2
    assert curves["delta"] == pytest.approx([-1.2, -0.6, 0, 0.6, 1.2])
    one_way = curves["one_way"]
    assert one_way["OWPO"] == pytest.approx([1.2, 1.2, 1, 0.8, 0.8])
    assert one_way["w/o Asym"] == pytest.approx([0.8, 0.8, 1, 0.8, 0.8])
    assert one_way["w/o Locking"] == pytest.approx([1.2, 1.2, 1, 1, 1])
    assert one_way["w/o Accel"] == pytest.approx([1, 1, 1, 0.8, 0.8])
    assert one_way["DAPO"] == pytest.approx([1] * 5)
    right, wrong, paper, distilled = curves["pulling"].values()
    # beta 2: 1 - 2 (1 - e^-delta) for A = 1, 1 + 2 (1 - e^delta) for A = -1: below zero at delta = 1.2
    assert right == pytest.approx([1 - 2 * (1 - math.exp(-d)) for d in curves["delta"]]) and right[-1] < 0
    assert wrong == pytest.approx([1 + 2 * (1 - math.exp(d)) for d in curves["delta"]]) and wrong[-1] < right[-1]
    assert paper == pytest.approx([3.4, 2.2, 1, -0.2, -1.4])
    assert distilled == pytest.approx([1.2, 0.6, 0, -0.6, -1.2]), "distillation knows no verifier"
    draw_dynamics(curves["delta"], curves["pulling"], curves["one_way"], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
