"""ROVER and Lp-Reg: numbers worked by hand, special cases, and the authors' formulas in one piece, through the head.

The formulas are written here again from tinnerhrhe/ROVER (Countdown) and CarlanLark/Lp-Reg-dev, on [responses, tokens]
and whole logits. Their functions are part of forks of verl that cannot be installed beside it.
"""

from __future__ import annotations

import math

import pytest
import torch
from evaluated import Response, evaluate

from owpo_megatron.head import Head
from owpo_megatron.methods import Method, StepView, make_method
from owpo_megatron.methods.prepare import prepared_in_microbatch
from owpo_megatron.types import TokenBatch

LOG = math.log


# ------------------------------------------------------------------------------------------------------ ROVER
def test_rover_by_hand() -> None:
    """A vocabulary of two. Q of the first token: log 1.6; of the second: log .5. The policy at the second token moved
    from (.5, .5) to (.75, .25): its mean Q is (log 1.5 + log .5) / 2 = -.143841."""
    mean_now, mean_old = (LOG(0.75) + LOG(0.25)) / 2, LOG(0.5)
    one = Response(
        [LOG(0.8), LOG(0.25)], [LOG(0.5), LOG(0.5)], 0.5, statistic=[9.0, mean_now], old_statistic=[7.0, mean_old]
    )
    next_q = (LOG(1.5) + LOG(0.5)) / 2
    assert next_q == pytest.approx(-0.143841, abs=1e-6)
    errors = [LOG(1.6) - (0.5 + next_q), LOG(0.5) - 0.5]
    found = evaluate(make_method("rover"), [one])
    assert found.loss == pytest.approx(-(errors[0] ** 2 + errors[1] ** 2) / 2)
    assert found.gradients[0] == pytest.approx([-2 * errors[0], -2 * errors[1]])
    assert found.metrics["next_q"] == pytest.approx(next_q) and found.metrics["clip_count"] == 0


def test_rover_without_the_next_token_is_a_regression_on_the_centred_reward() -> None:
    one = Response([LOG(0.8), LOG(0.25)], [LOG(0.5), LOG(0.5)], 0.5, statistic=[1.0, 2.0], old_statistic=[3.0, 5.0])
    found = evaluate(make_method("rover", gamma=0.0, rho=2.0), [one])
    errors = [2 * LOG(1.6) - 0.5, 2 * LOG(0.5) - 0.5]
    assert found.gradients[0] == pytest.approx([-4 * error for error in errors])
    # old = now: the policy gradient of 2 (R - mean)
    same = Response(one.old, one.old, 0.5, statistic=[1.0, 2.0], old_statistic=[1.0, 2.0])
    assert evaluate(make_method("rover"), [same]).gradients[0] == pytest.approx([1.0, 1.0])


def test_rover_centres_rewards() -> None:
    step = StepView([1.0, 0.0, 0.0, 0.0, 1.0], [True] * 4 + [False], [0] * 5, [1] * 5)
    assert make_method("rover").advantages(step) == pytest.approx([0.75, -0.25, -0.25, -0.25, 0.0])


# ------------------------------------------------------------------------------------------------------ Lp-Reg
def test_lp_reg_by_hand() -> None:
    """Four tokens with A < 0: the two least probable are looked at, and one is below its proxy."""
    now = [LOG(0.6), LOG(0.1), LOG(0.05), LOG(0.5)]
    proxy = [LOG(0.99), LOG(0.2), -math.inf, LOG(0.99)]
    method = make_method("lp_reg", share=0.5, beta=3.0)
    found = evaluate(method, [Response(now, now, -2.0, old_statistic=proxy)])
    k3 = 2 - LOG(2) - 1
    assert found.loss == pytest.approx((-2.0 * 4 - 3 * k3) / 4)
    # -d k3 / d log π = proxy / π - 1 = 1
    assert found.gradients[0] == pytest.approx([-2.0, -2.0 + 3.0, -2.0, -2.0])
    assert found.metrics["held_sum"] == 1
    # a right answer's tokens are never looked at, and a share that rounds to no token holds none
    assert evaluate(method, [Response(now, now, 2.0, old_statistic=proxy)]).metrics["held_sum"] == 0
    few = evaluate(make_method("lp_reg", share=0.2), [Response(now, now, -2.0, old_statistic=proxy)])
    assert few.metrics["held_sum"] == 0


def test_lp_reg_far_below_its_proxy_there_is_no_pull() -> None:
    """k3 is bounded by 10 as in verl; nothing overflows."""
    one = Response([-200.0, -1.0], [-200.0, -1.0], -1.0, old_statistic=[-2.0, -math.inf])
    found = evaluate(make_method("lp_reg", share=0.5), [one])
    assert found.gradients[0] == pytest.approx([-1.0, -1.0]) and found.loss == pytest.approx((-2 - 10) / 2)


def minibatch(method: Method, rows: int = 60, vocab: int = 11) -> tuple[TokenBatch, dict[str, torch.Tensor]]:
    """Twelve responses of five tokens in three groups, and what makes the logits of both policies."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target_T = torch.randint(0, vocab, (rows,), generator=generator)
    parts = {"h": 0.5 * normal(rows, 6), "weight": normal(vocab, 6), "target": target_T}
    parts["old_weight"] = parts["weight"] + 0.3 * normal(vocab, 6)
    old = Head(parts["old_weight"]).logprobs(parts["h"], parts["target"], statistic=method.statistic)
    every_T, sample_T = torch.ones(rows, dtype=torch.bool), torch.arange(rows) // 5
    advantage_S = normal(12)
    batch = TokenBatch(
        old_logp_T=old.logp_T, old_statistic_T=old.statistic_T, ref_logp_T=old.logp_T, behaviour_logp_T=old.logp_T,
        advantage_T=advantage_S[sample_T], active_T=every_T, mask_T=every_T, sample_T=sample_T, num_samples=12,
        reward_S=(advantage_S > 0).double(), group_S=torch.arange(12) // 4,
    )  # fmt: skip
    return batch, parts


def through_the_head(method: Method, batch: TokenBatch, parts: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """[loss, dh, dW], divided by the number of tokens."""
    leaves = (parts["h"].clone().requires_grad_(), parts["weight"].clone().requires_grad_())
    head = Head(leaves[1], chunk_rows=7)
    if method.coupling == "minibatch":
        now = head.logprobs(leaves[0].detach(), parts["target"], statistic=method.statistic)
        batch = prepared_in_microbatch(method, batch, now.logp_T, now.entropy_T, now.statistic_T)
    loss = head.loss(leaves[0], parts["target"], batch, method).loss_sum / len(parts["h"])
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def compare(method: Method, formula) -> None:
    batch, parts = minibatch(method)
    leaves = (parts["h"].clone().requires_grad_(), parts["weight"].clone().requires_grad_())
    logits_TV, old_TV = leaves[0] @ leaves[1].t(), parts["h"] @ parts["old_weight"].t()
    loss = formula(logits_TV, old_TV, parts["target"], batch.advantage_T)
    expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for ours, theirs in zip(through_the_head(method, batch, parts), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def chosen(logits_TV: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    return logits_TV.log_softmax(1).gather(1, target_T[:, None])[:, 0]


@pytest.mark.parametrize(("rho", "gamma"), [(1.0, 1.0), (0.5, 0.3)])
def test_rover_is_the_authors_formula(rho: float, gamma: float) -> None:
    def formula(logits_TV, old_TV, target_T, advantage_T):
        current_q_BL, old_q_BL = (one.mean(1).sub(one.logsumexp(1)).view(12, 5) for one in (logits_TV, old_TV))
        next_q_BL = torch.cat([rho * (current_q_BL - old_q_BL)[:, 1:], torch.zeros(12, 1)], dim=1)
        q_BL = (rho * (chosen(logits_TV, target_T) - chosen(old_TV, target_T))).view(12, 5)
        return (q_BL - (advantage_T.view(12, 5) + gamma * next_q_BL).detach()).square().mean()

    compare(make_method("rover", rho=rho, gamma=gamma), formula)


@pytest.mark.parametrize(("share", "kappa", "beta"), [(0.5, 0.1, 1.0), (1.0, 0.0, 1.0), (0.4, 0.02, 0.4)])
def test_lp_reg_is_the_authors_formula(share: float, kappa: float, beta: float) -> None:
    held = []

    def formula(logits_TV, old_TV, target_T, advantage_T):
        p_TV = old_TV.softmax(1)
        filtered_TV = old_TV.masked_fill(p_TV < kappa * p_TV.amax(1, keepdim=True), -1e4)
        proxy_T, logp_T = chosen(filtered_TV, target_T), chosen(logits_TV, target_T)
        ratio_T = (logp_T - chosen(old_TV, target_T)).exp()
        loss_T = torch.maximum(-advantage_T * ratio_T, -advantage_T * ratio_T.clamp(0, 10))
        negative = (advantage_T < 0).nonzero()[:, 0]
        lowest = negative[logp_T.detach()[negative].topk(int(share * len(negative)), largest=False).indices]
        lowest = lowest[logp_T.detach()[lowest] < proxy_T[lowest]]
        away = proxy_T[lowest] - logp_T[lowest]
        pull = (away.exp() - away - 1).clamp(-10, 10)
        held.append(len(lowest))
        return loss_T.index_put((lowest,), -advantage_T[lowest] * ratio_T[lowest] + beta * pull).mean()

    compare(make_method("lp_reg", share=share, kappa=kappa, beta=beta), formula)
    assert held[0] >= 2


def test_lp_reg_without_a_share_is_the_clipped_surrogate() -> None:
    batch, parts = minibatch(make_method("lp_reg"))
    ours = through_the_head(make_method("lp_reg", share=0.0, clip_low=0.99), batch, parts)
    theirs = through_the_head(make_method("dapo", clip_low=0.99, clip_high=9.0), batch, parts)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
