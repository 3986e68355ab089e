"""The loss that is formed from FP8 logits: right for its own logits with every method, close to the exact head's.

Oracle: dense logits in float64 that have the values of FP8 and the derivative of the exact product. FP8 products are
simulated (operands rounded to e4m3, float32 GEMM); the GEMMs of a GPU are not covered.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from head_oracle import assert_same, dense_statistic, make_batch, make_inputs
from test_logprob import peaked_inputs
from tiny import make_config

from owpo_megatron.errors import UserError
from owpo_megatron.head import Head
from owpo_megatron.head.fp8 import CANDIDATES, Fp8Weight, exact_logits, quantise
from owpo_megatron.methods import Method, catalogue, dense_loss, make_method
from owpo_megatron.methods.prepare import prepared_in_microbatch
from owpo_megatron.types import TokenBatch

TEMPERATURE = 0.8
ROWS, VOCAB = 23, 150  # more columns than candidates: most of the vocabulary stays in FP8


def fp8_log_softmax(h_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor) -> torch.Tensor:
    """[T, V] float64, differentiable as if the logits were the exact product."""
    with torch.no_grad():
        screened_TV = Fp8Weight(weight_VH).logits(h_TH).double()
        best_TN = screened_TV.topk(CANDIDATES, dim=1).indices
        column_TN = torch.cat([best_TN, target_T[:, None]], dim=1)
        shifted_TV = screened_TV + TEMPERATURE * tail_shift(h_TH, weight_VH, screened_TV, column_TN)[:, None]
        refined_TV = shifted_TV.scatter(1, column_TN, exact_logits(h_TH, weight_VH, column_TN))
    exact_TV = h_TH @ weight_VH.t()
    return torch.log_softmax((exact_TV + (refined_TV - exact_TV).detach()) / TEMPERATURE, dim=1)


def tail_shift(
    h_TH: torch.Tensor, weight_VH: torch.Tensor, screened_TV: torch.Tensor, column_TN: torch.Tensor
) -> torch.Tensor:
    """[T] by the definitions, row by row: a Gaussian for every channel of W and of its error, sums over channels."""
    (w8_VH, scale), (h8_TH, h_scale) = quantise(weight_VH), quantise(h_TH)
    w8_VH, h8_TH = (w8_VH.float() * scale).double(), (h8_TH.float() * h_scale).double()
    both_VH = torch.cat([w8_VH, w8_VH - weight_VH], dim=1)
    mean_H, covariance_HH = both_VH.mean(dim=0), torch.cov(both_VH.t(), correction=0)
    H = weight_VH.shape[1]
    own_HH = torch.eye(H, dtype=torch.float64).repeat(2, 2) * covariance_HH  # of one channel's W and error alone
    shifts = []
    for row in range(len(h_TH)):
        h, h8 = h_TH[row], h8_TH[row]
        logit, error = torch.cat([h8, 0 * h8]), torch.cat([h8 - h, h])  # h8 w8 and h8 w8 - h w, of (w8, w8 - w)
        tail = screened_TV[row].index_fill(0, column_TN[row], -torch.inf) / TEMPERATURE
        p = torch.softmax(tail, dim=0)
        away = (p * screened_TV[row]).sum() - logit @ mean_H
        slope = (logit @ own_HH @ error) / (logit @ own_HH @ logit)
        noise = error @ own_HH @ error - slope * (logit @ own_HH @ error)
        shifts.append(-(error @ mean_H + slope * away) / TEMPERATURE + noise / (2 * TEMPERATURE**2))
    return torch.stack(shifts)


def dense(
    h_TH: torch.Tensor, weight_VH: torch.Tensor, target_T: torch.Tensor, batch: TokenBatch, method: Method
) -> dict[str, torch.Tensor]:
    h_TH, weight_VH = (value.clone().requires_grad_() for value in (h_TH, weight_VH))
    log_softmax_TV = fp8_log_softmax(h_TH, weight_VH, target_T)
    logp_T = log_softmax_TV.gather(1, target_T[:, None])[:, 0]
    entropy_T = -(log_softmax_TV.exp() * log_softmax_TV).sum(1)
    loss = dense_loss(method, logp_T, batch, entropy_T).loss_sum
    dh, dweight = torch.autograd.grad(loss, (h_TH, weight_VH))
    found = {"loss": loss, "logp": logp_T, "entropy": entropy_T, "dh": dh, "dweight": dweight}
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("entropy_bonus", [0.0, 0.3])
@pytest.mark.parametrize("name", sorted(catalogue()))
def test_every_method_is_right_for_its_own_logits(name: str, entropy_bonus: float) -> None:
    """Clipped and zero rows are dropped here, and are zeros of the dense form."""
    h_TH, weight_VH, target_T = make_inputs(rows=ROWS, vocab=VOCAB)
    log_softmax_TV = fp8_log_softmax(h_TH, weight_VH, target_T)
    logp_T = log_softmax_TV.gather(1, target_T[:, None])[:, 0]
    entropy_T = -(log_softmax_TV.exp() * log_softmax_TV).sum(1)
    batch = replace(
        make_batch(logp_T), old_mode="fp8_refined", ref_mode="fp8_refined", now_mode="fp8_refined",
        reward_S=torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 1.0]), group_S=torch.tensor([0, 0, 1, 1, 2, 2]),
    )  # fmt: skip
    method = make_method(name, entropy_coef=entropy_bonus)
    if method.coupling != "token":
        statistic_T = dense_statistic(method.statistic, log_softmax_TV, logp_T)
        batch = prepared_in_microbatch(method, batch, logp_T, entropy_T, statistic_T)
    expected = dense(h_TH, weight_VH, target_T, batch, method)
    assert expected["dh"].abs().max() > 1e-3
    leaves = (h_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_())
    out = Head(leaves[1], TEMPERATURE).loss(leaves[0], target_T, batch, method, "fp8_refined")
    dh, dweight = torch.autograd.grad(out.loss_sum, leaves)
    found = {
        "loss": out.loss_sum.detach(), "logp": out.logp_T, "entropy": out.entropy_T, "dh": dh, "dweight": dweight,
    }  # fmt: skip
    assert_same(found, expected, 1e-9)
    exact_T = torch.log_softmax(h_TH @ weight_VH.t() / TEMPERATURE, 1).gather(1, target_T[:, None])[:, 0]
    assert 1e-5 < (out.logp_T - exact_T).abs().mean() < 0.02, "the logits of this case are in FP8"


def test_both_passes_see_the_same_bits() -> None:
    """So that the ratio is exactly 1 before the first update, in FP8 too."""
    h_TH, weight_VH, target_T = peaked_inputs(rows=64)
    head = Head(weight_VH, chunk_rows=20)
    logp_T = head.logprobs(h_TH, target_T, mode="fp8_refined").logp_T
    batch = replace(make_batch(logp_T), old_mode="fp8_refined", ref_mode="fp8_refined")
    leaf_TH = h_TH.clone().requires_grad_()
    out = head.loss(leaf_TH, target_T, batch, make_method("owpo"), "fp8_refined")
    assert torch.equal(out.logp_T, logp_T)


@pytest.mark.parametrize("name", ["owpo", "grpo", "opd"])
def test_close_to_the_exact_head(name: str) -> None:
    """A vocabulary of 32,768 with certain and spread tokens: angle and norm of both gradients."""
    h_TH, weight_VH, target_T = peaked_inputs(rows=64, vocab=32768)
    gradients = {}
    for mode in ("exact", "fp8_refined"):
        head = Head(weight_VH.clone().requires_grad_())
        logp_T = head.logprobs(h_TH, target_T, mode=mode).logp_T
        batch = replace(make_batch(logp_T.double()), old_mode=mode, ref_mode=mode)
        leaf_TH = h_TH.clone().requires_grad_()
        out = head.loss(leaf_TH, target_T, batch, make_method(name), mode)
        gradients[mode] = [one.double() for one in torch.autograd.grad(out.loss_sum, (leaf_TH, head.weight_VH))]
    for exact, found in zip(*gradients.values(), strict=True):
        assert (exact * found).sum() / (exact.norm() * found.norm()) > 0.9999
        assert abs(found.norm() / exact.norm() - 1) < 2e-3
        assert not torch.equal(exact, found)


@pytest.mark.parametrize("field", ["old_mode", "ref_mode"])
def test_one_mode_per_ratio(field: str) -> None:
    h_TH, weight_VH, target_T = peaked_inputs(rows=32)
    batch = replace(make_batch(torch.zeros(32)), old_mode="fp8_refined", ref_mode="fp8_refined")
    method = make_method("owpo")
    what = {"old_mode": "old", "ref_mode": "reference"}[field]
    with pytest.raises(TypeError, match=f"{what} log-probs are exact, the policy's fp8_refined"):
        Head(weight_VH).loss(h_TH, target_T, replace(batch, **{field: "exact"}), method, "fp8_refined")
    with pytest.raises(TypeError, match="no ratio may be formed of fp8_raw"):
        Head(weight_VH).loss(h_TH, target_T, batch, method, "fp8_raw")
    Head(weight_VH).loss(h_TH, target_T, replace(batch, **{field: None}), method, "fp8_refined")


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_what_is_a_difference_of_log_probs_itself_is_refused(name: str) -> None:
    """OPD is beyond the bounds of the error table (docs/kernel.md), and ROVER regresses such differences, the tail of
    the vocabulary included; the check at a run's start cannot see it."""
    sections: dict[str, Any] = {
        "algorithm": {"name": name},
        "model": {"head": "fp8_refined"},
        "teachers": [{"name": "t", "path": "t"}],
    }
    if make_method(name).reference != "teacher":
        del sections["teachers"]
    with pytest.raises(UserError, match="set exact") if name in ("opd", "rover") else nullcontext():
        make_config(Path("m"), **sections)
