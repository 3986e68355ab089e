"""Every method on seven tokens worked by hand, and on random ones against an oracle in Python's floats.

The tokens (old log-prob -1 throughout; r = pi / pi_old, q = pi / pi_ref; A of the sample):

    token     0      1      2  |    3      4      5  |  6
    sample    0      0      0  |    1      1      1  |  2
    A        +2     +2     +2  |   -1     -1     -1  |  0
    r         1     1.5    0.5 |    1     1.5    0.5 |  1
    q       10/9   1/1.1   1/2 |   1/2    1.1    0.9 |  2

With the range [0.8, 1.28]: token 1 is clipped above (A > 0), token 5 below (A < 0); 2 and 4 lie outside the range on
the side that is not clipped.

    token   min(r A, clip(r) A)          slope in logp (r A where not clipped)
    0       2                            2
    1       min(3, 2.56) = 2.56          0
    2       min(1, 1.6) = 1              1
    3       -1                           -1
    4       min(-1.5, -1.28) = -1.5      -1.5
    5       min(-0.5, -0.8) = -0.8       0
    6       0                            0
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from objective_oracle import Token, oracle

from owpo_megatron.head import Head
from owpo_megatron.methods import Loss, catalogue, dense_loss, make_method
from owpo_megatron.types import TokenBatch

RATIO = [1, 1.5, 0.5, 1, 1.5, 0.5, 1]
TO_REFERENCE = [10 / 9, 1 / 1.1, 1 / 2, 1 / 2, 1.1, 0.9, 2]
ADVANTAGE = [2, 2, 2, -1, -1, -1, 0]
SAMPLE = [0, 0, 0, 1, 1, 1, 2]
LN2, LN10_9 = math.log(2), math.log(10 / 9)


def k3(q: float) -> float:
    """exp(ref - logp) - (ref - logp) - 1 with q = pi / pi_ref."""
    return 1 / q + math.log(q) - 1


def pull(q: float) -> float:
    """d k3 / d logp."""
    return 1 - 1 / q


# The penalised methods with beta 0.1.
PENALTY = [0.1 * k3(q) for q in TO_REFERENCE]
PULL = [0.1 * pull(q) for q in TO_REFERENCE]

BY_HAND = {
    # 2 + 2.56 + 1 - 1 - 1.5 - 0.8 + 0 = 2.26 over 7 tokens
    "dapo": (2.26, 7, [2, 0, 1, -1, -1.5, 0, 0]),
    # delta = sgn(A) ln q: >0, <0, <0 | >0, <0, >0 | 0. exp(-delta) = 1/q for A > 0, q for A < 0:
    #   w = 0.9, 1.1, 2 -> 1.2 | 0.5 -> 0.8, 1.1, 0.9 | 1
    # 1.8 + 2.816 + 1.2 - 0.8 - 1.65 - 0.72 = 2.646
    "owpo": (2.646, 7, [1.8, 0, 1.2, -0.8, -1.65, 0, 0]),
    # w = clip(exp(-|ln q|)) = 0.9, 1/1.1, 0.5 -> 0.8 | 0.5 -> 0.8, 1/1.1, 0.9 | 1 (A = 0 makes delta 0)
    # 1.8 + 2.56/1.1 + 0.8 - 0.8 - 1.5/1.1 - 0.72 = 1.08 + 1.06/1.1
    "owpo_no_asym": (1.08 + 1.06 / 1.1, 7, [1.8, 0, 0.8, -0.8, -1.5 / 1.1, 0, 0]),
    # delta > 0 gets 1: w = 1, 1.1, 1.2 | 1, 1.1, 1 | 1;  2 + 2.816 + 1.2 - 1 - 1.65 - 0.8 = 2.566
    "owpo_no_locking": (2.566, 7, [2, 0, 1.2, -1, -1.65, 0, 0]),
    # delta < 0 gets 1: w = 0.9, 1, 1 | 0.8, 1, 0.9 | 1;  1.8 + 2.56 + 1 - 0.8 - 1.5 - 0.72 = 2.34
    "owpo_no_accel": (2.34, 7, [1.8, 0, 1, -0.8, -1.5, 0, 0]),
    # DAPO's value minus beta k3 on every token, the one with A = 0 too; the pull acts where clipping cut the rest
    "sym_dapo": (
        2.26 - sum(PENALTY),
        7,
        [slope - p for slope, p in zip([2, 0, 1, -1, -1.5, 0, 0], PULL, strict=True)],
    ),
    # range [0.8, 1.2]: token 1 is min(3, 2.4) = 2.4. Mean over the tokens of a sample, three samples:
    #   (2 + 2.4 + 1)/3 + (-1 - 1.5 - 0.8)/3 + 0/1 = 1.8 - 1.1, minus the penalty's means
    "grpo": (
        1.8 - 1.1 - sum(PENALTY[:3]) / 3 - sum(PENALTY[3:6]) / 3 - PENALTY[6],
        3,
        [(slope - p) / n for slope, p, n in zip([2, 0, 1, -1, -1.5, 0, 0], PULL, [3, 3, 3, 3, 3, 3, 1], strict=True)],
    ),
    # r outside [0.8, 1.28] drops tokens 1, 2, 4, 5, whatever A. Push r (ref - logp) = -ln q: -ln(10/9), ln 2, -ln 2;
    # value push * logp / n with logp = -1 and n = 3, 3, 1; A is not used
    "opd": (LN10_9 / 3 - LN2 / 3 + LN2, 3, [-LN10_9 / 3, 0, 0, LN2 / 3, 0, 0, -LN2]),
    # alpha 5: the push gets 5 A = 10, -5, 0
    "mopd": (
        -(10 - LN10_9) / 3 - (-5 + LN2) / 3 + LN2,
        3,
        [(10 - LN10_9) / 3, 0, 0, (-5 + LN2) / 3, 0, 0, -LN2],
    ),
}
CLIPPED = dict.fromkeys(BY_HAND, 2) | {"opd": 4, "mopd": 4}


def method(name: str, **changed: float):
    return make_method(name, **({"beta": 0.1} if name in ("grpo", "sym_dapo") else {}), **changed)


def by_hand_batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, TokenBatch]:
    old_T = torch.full((7,), -1.0, dtype=dtype)
    logp_T = old_T + torch.tensor(RATIO, dtype=dtype).log()
    mask_T = torch.ones(7, dtype=torch.bool)
    batch = TokenBatch(
        old_logp_T=old_T,
        ref_logp_T=logp_T - torch.tensor(TO_REFERENCE, dtype=dtype).log(),
        advantage_T=torch.tensor(ADVANTAGE, dtype=dtype),
        active_T=mask_T,
        mask_T=mask_T,
        sample_T=torch.tensor(SAMPLE),
        num_samples=3,
    )
    return logp_T, batch


def differentiate(objective, logp_T: torch.Tensor, batch: TokenBatch) -> tuple[Loss, list[float]]:
    leaf_T = logp_T.clone().requires_grad_()
    out = dense_loss(objective, leaf_T, batch)
    return out, torch.autograd.grad(out.loss_sum, leaf_T)[0].tolist()


def test_the_papers_methods_are_here() -> None:
    """The others: test_token_objectives.py, test_coupled_objectives.py and test_step_advantages.py."""
    papers = {name for name, one in catalogue().items() if ".methods.paper." in one.__module__}
    assert set(BY_HAND) == papers | {"dapo", "grpo"}


@pytest.mark.parametrize("name", BY_HAND)
def test_value_gradient_normaliser_and_clip_by_hand(name: str) -> None:
    value, count, slope = BY_HAND[name]
    out, gradient = differentiate(method(name), *by_hand_batch())
    assert out.loss_sum.item() == pytest.approx(-value, abs=1e-13)
    assert out.count.item() == count
    assert gradient == pytest.approx([-x for x in slope], abs=1e-13)
    assert out.metrics["clip_count"].item() == CLIPPED[name]


@pytest.mark.parametrize("name", [name for name in BY_HAND if name.startswith("owpo")])
def test_without_active_samples_the_family_is_dapo_by_hand(name: str) -> None:
    logp_T, batch = by_hand_batch()
    out, gradient = differentiate(method(name), logp_T, replace(batch, active_T=torch.zeros_like(batch.mask_T)))
    assert out.loss_sum.item() == pytest.approx(-2.26, abs=1e-13)
    assert gradient == pytest.approx([-2, 0, -1, 1, 1.5, 0, 0], abs=1e-13)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_zero_advantage_gives_exactly_zero_but_for_references(name: str) -> None:
    """Such rows leave before the head's backward; only the terms that the reference alone makes keep them."""
    logp_T, batch = by_hand_batch()
    _, gradient = differentiate(method(name), logp_T, batch)
    has_own_term = name in ("grpo", "sym_dapo", "opd", "mopd")
    assert (gradient[6] != 0) == has_own_term
    _, gradient = differentiate(method(name), logp_T, replace(batch, ref_logp_T=logp_T))
    assert gradient[6] == 0, "and not even those where the policy is the reference"


# --------------------------------------------------------------------------------------------- truncated importance
def with_engine(batch: TokenBatch, factors: list[float]) -> TokenBatch:
    """The engine's probabilities are the old policy's divided by these."""
    return replace(batch, behaviour_logp_T=batch.old_logp_T - torch.tensor(factors, dtype=torch.float64).log())


def test_truncated_importance_by_hand() -> None:
    """Factors 1, 0.5, 3 -> 2 | 0.25, 2, 1 | 5 -> 2 with cap 2, on DAPO's values and slopes:
    2 + 1.28 + 2 - 0.25 - 3 - 0.8 + 0 = 1.23, still over seven tokens."""
    logp_T, batch = by_hand_batch()
    objective = method("dapo", tis_cap=2.0)
    out, gradient = differentiate(objective, logp_T, with_engine(batch, [1, 0.5, 3, 0.25, 2, 1, 5]))
    assert out.loss_sum.item() == pytest.approx(-1.23, abs=1e-13) and out.count == 7
    assert gradient == pytest.approx([-2, 0, -2, 0.25, 3, 0, 0], abs=1e-13)
    assert out.metrics["tis_sum"].item() == pytest.approx(1 + 0.5 + 2 + 0.25 + 2 + 1 + 2)
    assert out.metrics["tis_capped"].item() == 2, "tokens 2 and 6; a factor of exactly 2 was not cut"
    # grpo's mean over a sample keeps its divisor: the factor weighs tokens, it does not count them
    value, _, slope = BY_HAND["grpo"]
    even = differentiate(method("grpo", tis_cap=2.0), logp_T, with_engine(batch, [2.0] * 7))
    assert even[0].loss_sum.item() == pytest.approx(-2 * value, abs=1e-13) and even[0].count == 3
    assert even[1] == pytest.approx([-2 * x for x in slope], abs=1e-13)


@pytest.mark.parametrize("name", BY_HAND)
def test_an_engine_that_agrees_changes_no_bit(name: str) -> None:
    logp_T, batch = by_hand_batch()
    plain, gradient = differentiate(method(name), logp_T, batch)
    corrected = method(name, tis_cap=2.0)
    same, same_gradient = differentiate(corrected, logp_T, replace(batch, behaviour_logp_T=batch.old_logp_T))
    assert torch.equal(plain.loss_sum, same.loss_sum) and gradient == same_gradient
    assert same.metrics["tis_sum"] == 7 and same.metrics["tis_capped"] == 0
    assert set(same.metrics) == set(plain.metrics) | {"tis_sum", "tis_capped"}
    assert corrected.needs_reference == method(name).needs_reference
    assert corrected.dynamic_sampling == method(name).dynamic_sampling


@pytest.mark.parametrize("name", ["owpo", "grpo"])
def test_the_head_with_the_correction_against_dense_autograd(name: str) -> None:
    """Gradients of hidden states and weight; rows without gradient still leave before the head's backward GEMMs."""
    generator = torch.Generator().manual_seed(1)
    h_TH, weight_VH = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((7, 4), (11, 4)))
    target_T = torch.randint(0, 11, (7,), generator=generator)
    h_TH.requires_grad_(), weight_VH.requires_grad_()
    dense_T = (h_TH @ weight_VH.T).log_softmax(dim=1).gather(1, target_T[:, None])[:, 0]
    _, made = by_hand_batch()
    old_T = dense_T.detach() - torch.tensor(RATIO, dtype=torch.float64).log()
    batch = replace(made, old_logp_T=old_T, ref_logp_T=dense_T.detach() - torch.tensor(TO_REFERENCE).double().log())
    batch = with_engine(batch, [1, 0.5, 3, 0.25, 2, 1, 5])
    objective = method(name, tis_cap=2.0)
    expected = torch.autograd.grad(dense_loss(objective, dense_T, batch).loss_sum, (h_TH, weight_VH))
    out = Head(weight_VH, chunk_rows=3).loss(h_TH, target_T, batch, objective)
    for found, wanted in zip(torch.autograd.grad(out.loss_sum, (h_TH, weight_VH)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    # owpo: tokens 1 and 5 are clipped, 6 has A = 0; grpo's penalty keeps them all
    assert out.rows.gradient == {"owpo": 4, "grpo": 7}[name]


# --------------------------------------------------------------------------------------------- the oracle
def random_tokens(seed: int, count: int = 60) -> list[Token]:
    """Samples of one to ten tokens; every fifth sample has A = 0, every third is inactive."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> float:
        return float(torch.randn((), generator=generator, dtype=torch.float64)) * scale

    tokens: list[Token] = []
    sample = 0
    while len(tokens) < count:
        advantage = 0.0 if sample % 5 == 4 else draw(1.0)
        for _ in range(1 + int(torch.randint(0, 10, (), generator=generator))):
            old = -0.05 - abs(draw(1.0))
            logp = old + draw(0.25)
            factor = math.exp(draw(0.5))
            tokens.append(Token(logp, old, logp + draw(0.25), advantage, sample % 3 != 2, sample, factor))
        sample += 1
    return tokens


def tensors(tokens: list[Token]) -> tuple[torch.Tensor, TokenBatch]:
    """Packed with a masked token in front of every sample, as prompts are."""
    rows: list[Token | None] = []
    for index, token in enumerate(tokens):
        if index == 0 or tokens[index - 1].sample != token.sample:
            rows.append(None)
        rows.append(token)

    def column(field: str, fill: float = 0.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.tensor([fill if row is None else getattr(row, field) for row in rows], dtype=dtype)

    old_T = column("old")
    batch = TokenBatch(
        old_logp_T=old_T,
        ref_logp_T=column("ref"),
        advantage_T=column("advantage"),
        active_T=column("active", 0, torch.bool),
        mask_T=torch.tensor([row is not None for row in rows]),
        sample_T=column("sample", 0, torch.int64),
        num_samples=tokens[-1].sample + 1,
        behaviour_logp_T=old_T - column("factor", 1.0).log(),
    )
    return column("logp"), batch


CHANGED: dict[str, dict[str, float]] = {
    "paper": {},
    "clips": {"clip_low": 0.1, "clip_high": 0.15},
    "own": {"weight_low": 0.9, "weight_high": 1.05, "beta": 0.3, "alpha": 0.5},
}


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("setting", CHANGED)
@pytest.mark.parametrize("name", BY_HAND)
def test_against_the_oracle(name: str, setting: str, corrected: bool) -> None:
    known = vars(make_method(name))
    changed = {field: value for field, value in CHANGED[setting].items() if field in known}
    tokens = random_tokens(seed=len(name))
    logp_T, batch = tensors(tokens)
    cap = 1.4
    for token in tokens:
        token.factor = min(token.factor, cap) if corrected else 1.0
    objective = make_method(name, tis_cap=cap if corrected else None, **changed)
    loss, count, slope = oracle(name, tokens, **changed)
    out, gradient = differentiate(objective, logp_T, batch)
    assert out.loss_sum.item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert out.count.item() == count
    inside = [value for value, mask in zip(gradient, batch.mask_T.tolist(), strict=True) if mask]
    assert inside == pytest.approx(slope, rel=1e-12, abs=1e-13)
    assert not any(value for value, mask in zip(gradient, batch.mask_T.tolist(), strict=True) if not mask)
