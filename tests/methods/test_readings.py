"""Switches for readings of the paper's text, each against numbers worked by hand; defaults are tested elsewhere."""

from __future__ import annotations

import math

import pytest
import torch

from owpo_megatron.errors import UserError
from owpo_megatron.methods import ChunkBatch, Method, dense_loss, effective_progress, make_method
from owpo_megatron.methods.metrics import BETAS
from owpo_megatron.types import TokenBatch


def chunk(
    logp: list[float], ref: list[float], old: list[float], advantage: list[float]
) -> tuple[torch.Tensor, ChunkBatch]:
    logp_C = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    rest = (torch.tensor(values, dtype=torch.float64) for values in (old, ref, advantage))
    return logp_C, ChunkBatch(*rest, active_C=torch.ones(len(logp), dtype=torch.bool))


def gradient(method: Method, logp_C: torch.Tensor, batch: ChunkBatch) -> list[float]:
    value_C = method.terms(logp_C, batch).value_C
    return torch.autograd.grad(value_C.sum(), logp_C)[0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["sym_dapo", "grpo"])
def test_the_quadratic_penalty(name: str) -> None:
    """z = 0.5 and -0.2, r = 1, A = 2 and -1, beta 0.1: A - 0.1 z^2 / 2, with the slope A - 0.1 z."""
    logp_C, batch = chunk([-1.0, -1.0], [-1.5, -0.8], [-1.0, -1.0], [2.0, -1.0])
    method = make_method(name, beta=0.1, penalty="k2")
    assert method.terms(logp_C, batch).value_C.tolist() == pytest.approx([2 - 0.0125, -1 - 0.002])
    assert gradient(method, logp_C, batch) == pytest.approx([2 - 0.05, -1 + 0.02])


def test_the_quadratic_penalty_is_the_papers_section_4() -> None:
    """1 - beta delta / |A| exactly, so that it is negative beyond |A| / beta; k3 only has this slope at 0."""
    delta_D = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)
    for advantage in (1.0, -1.0, 0.5):
        found_D = effective_progress(make_method("sym_dapo", beta=0.8, penalty="k2"), delta_D, advantage)
        assert found_D.tolist() == pytest.approx((1 - 0.8 * delta_D / abs(advantage)).tolist())
    k3_D = effective_progress(make_method("sym_dapo", beta=0.8), delta_D, 1.0)
    assert (k3_D > 0).all() and not torch.allclose(k3_D, 1 - 0.8 * delta_D)


def test_reversed_tokens_are_counted_with_either_penalty() -> None:
    """beta 3, A = 1: k2 reverses beyond z = 1/3, k3 beyond 1 - exp(-z) = 1/3, z = 0.405."""
    logp_C, batch = chunk([-1.0] * 3, [-1.3, -1.4, -1.5], [-1.0] * 3, [1.0] * 3)
    counts = {}
    for penalty in ("k2", "k3"):
        terms = make_method("sym_dapo", beta=3.0, penalty=penalty).terms(logp_C, batch)
        counts[penalty] = terms.metrics["reversed_count"].tolist()
    assert counts == {"k2": [False, True, True], "k3": [False, False, True]}


def test_w_may_compare_the_policy_of_the_steps_start() -> None:
    """Reference at -1, A > 0: the policy is at -1.1 now (w = exp(0.1)) and was at -0.95 (w = exp(-0.05))."""
    logp_C, batch = chunk([-1.1], [-1.0], [-0.95], [1.0])
    for policy, weight in (("current", math.exp(0.1)), ("old", math.exp(-0.05))):
        method = make_method("owpo", weight_policy=policy)
        assert method.weights(logp_C, batch).tolist() == pytest.approx([weight])  # type: ignore[attr-defined]
        assert gradient(method, logp_C, batch) == pytest.approx([weight * math.exp(-0.15)])
    with pytest.raises(UserError, match="algorithm.weight_policy = new: must be one of current, old"):
        make_method("owpo", weight_policy="new")


def test_two_ways_of_leaving_out_the_sign() -> None:
    """z = 0.1 and -0.1, A > 0 and A < 0: by magnitude always exp(-0.1); by the log-ratio exp(-z), whatever A is."""
    logp_C, batch = chunk([-1.0] * 4, [-1.1, -0.9, -1.1, -0.9], [-1.0] * 4, [1.0, 1.0, -1.0, -1.0])
    down, up = math.exp(-0.1), math.exp(0.1)
    expected = {"magnitude": [down] * 4, "log_ratio": [down, up, down, up]}
    for form, weights in expected.items():
        found = make_method("owpo_no_asym", asymmetry=form).weights(logp_C, batch)  # type: ignore[attr-defined]
        assert found.tolist() == pytest.approx(weights)
    owpo = make_method("owpo").weights(logp_C, batch)  # type: ignore[attr-defined]
    assert owpo.tolist() == pytest.approx([down, up, up, down])


@pytest.mark.parametrize(
    ("divisor", "loss_sum", "count"), [("tokens", 8.0, 4), ("samples", 4.0, 2), ("sample_sums", 8.0, 2)]
)
@pytest.mark.parametrize("name", ["dapo", "mopd", "owpo"])
def test_the_divisor_can_be_chosen(name: str, divisor: str, loss_sum: float, count: int) -> None:
    """Samples of 1 and 3 tokens, each worth -2 (A = -2, r = 1): 8 over 4 tokens, 2 + 2 over 2 samples, 8 over 2."""
    batch = TokenBatch(
        old_logp_T=torch.full((4,), -1.0),
        ref_logp_T=torch.full((4,), -1.0),
        advantage_T=torch.full((4,), -2.0),
        active_T=torch.ones(4, dtype=torch.bool),
        mask_T=torch.ones(4, dtype=torch.bool),
        sample_T=torch.tensor([0, 1, 1, 1]),
        num_samples=2,
    )
    method = make_method(name, divide_by=divisor)
    loss = dense_loss(method, torch.full((4,), -1.0), batch)
    scale = 5.0 * -1.0 if name == "mopd" else 1.0  # sg(alpha A) logp with logp = -1
    assert loss.loss_sum.item() == pytest.approx(loss_sum * scale) and int(loss.count) == count


def test_tokens_that_a_symmetric_kl_would_turn() -> None:
    """A r = 1 is turned where beta z > 1: z = 0.5 from beta 3 on (1.5), 0.05 not even by 10 (0.5), -0.5 never.

    The fourth token mirrors the first: A = -1, z = -0.5. The last one's ratio is e^0.5 > 1.28: it is clipped, pushed
    nowhere, and any beta turns it, since z = 0.2 > 0.
    """
    logp_C, batch = chunk([-1.0] * 4 + [-0.5], [-1.5, -1.05, -0.5, -0.5, -0.7], [-1.0] * 5, [1.0, 1.0, 1.0, -1.0, 1.0])
    for name in ("owpo", "owpo_no_accel", "sym_dapo"):
        found_CB = make_method(name).terms(logp_C, batch).metrics["turned_count"]
        large = [beta >= 3 for beta in BETAS]
        assert found_CB.tolist() == [large, [False] * 9, [False] * 9, large, [True] * 9]
    assert not make_method("owpo").terms(logp_C, batch).metrics["reversed_count"].any()


@pytest.mark.parametrize("beta", BETAS)
def test_what_is_asked_of_owpos_tokens_is_what_sym_dapo_does(beta: float) -> None:
    """The count for a beta is the number of tokens that Sym-DAPO's own gradient turns with this beta."""
    generator = torch.Generator().manual_seed(1)
    old, noise, ref = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    logp_C, batch = chunk((old + 0.2 * noise).tolist(), (old + 0.5 * ref).tolist(), old.tolist(), noise.sign().tolist())
    asked_C = make_method("owpo").terms(logp_C, batch).metrics["turned_count"][:, BETAS.index(beta)]
    slope_C = torch.tensor(gradient(make_method("sym_dapo", beta=beta, penalty="k2"), logp_C, batch))
    assert torch.equal(asked_C, slope_C * batch.advantage_C < 0)
    assert asked_C.any() and not asked_C.all()
