"""Prediction of what FP8 does to a tail: the moments by their definition, and how much of the error goes.

FP8 products are simulated. The formula itself is held to float64 in test_fp8_loss.py, row by row, with every method.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from head_oracle import dense_logp, make_inputs

from owpo_megatron.head import Head, head_error, tail
from owpo_megatron.head.fp8 import quantise
from owpo_megatron.head.tail import Moments


@contextmanager
def without_shift() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "MAX_SHIFT", 0.0)
        yield


def flat_head(correlated: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(h, weight) in bfloat16 of nearly flat distributions over 8,192 columns; or with a mean row, as trained ones."""
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(8192, 192, generator=generator) * 0.05
    h_TH = torch.randn(160, 192, generator=generator)
    if correlated:
        weight_VH += 0.1 * torch.randn(1, 192, generator=generator)
    return h_TH.bfloat16(), weight_VH.bfloat16()


def test_moments_by_their_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take blocks of rows of which the last is short, with padding beyond the weight that does not count."""
    monkeypatch.setattr(tail, "_ROWS_AT_ONCE", 16)
    weight_VH = make_inputs(vocab=37, hidden=8)[1] + 0.5
    values_VH, scale = quantise(weight_VH)
    padded = torch.nn.functional.pad(values_VH.float(), (0, 8, 0, 11), value=3.0).to(torch.float8_e4m3fn)
    found = Moments.of(weight_VH, padded, scale)
    w8_VH = (values_VH.float() * scale).double()
    both = torch.cov(torch.cat([w8_VH, w8_VH - weight_VH], dim=1).t(), correction=0)
    H = weight_VH.shape[1]
    expected = {
        "mean_H": w8_VH.mean(dim=0), "error_mean_H": (w8_VH - weight_VH).mean(dim=0), "variance_H": both.diag()[:H],
        "covariance_H": both[:H, H:].diag(), "error_variance_H": both.diag()[H:],
    }  # fmt: skip
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("correlated", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_most_of_a_flat_tails_error_goes(correlated: bool, temperature: float) -> None:
    h_TH, weight_VH = flat_head(correlated)
    target_T = torch.randint(0, 8192, (len(h_TH),), generator=torch.Generator().manual_seed(1))
    exact_T, entropy_T = dense_logp(h_TH, weight_VH, target_T, temperature)
    found = Head(weight_VH, temperature).logprobs(h_TH, target_T, mode="fp8_refined")
    with without_shift():
        plain = Head(weight_VH, temperature).logprobs(h_TH, target_T, mode="fp8_refined")
    error, plain_error = ((one.logp_T - exact_T).abs().mean().item() for one in (found, plain))
    assert plain_error > 1e-3 and error < plain_error / 4
    assert (found.entropy_T - entropy_T).abs().mean() < 1e-2


def test_gradients_are_closer_too() -> None:
    h_TH, weight_VH = flat_head(correlated=True)
    target_T = torch.randint(0, 8192, (len(h_TH),), generator=torch.Generator().manual_seed(1))
    error = head_error(Head(weight_VH), h_TH, target_T)
    with without_shift():
        plain = head_error(Head(weight_VH), h_TH, target_T)
    assert error.acceptable and not plain.acceptable
    assert error.dh.cosine >= plain.dh.cosine and error.dweight.cosine >= plain.dweight.cosine


@pytest.mark.parametrize("vocab", [1, 2, 32, 33, 34, 40])
@pytest.mark.parametrize("sharpness", [1.0, 1000.0])
def test_rows_without_a_tail(vocab: int, sharpness: float) -> None:
    """Every column refined, a tail of one column, or one whose probability is zero in float32."""
    h_TH, weight_VH, target_T = make_inputs(vocab=vocab, dtype=torch.float32)
    found = Head(weight_VH).logprobs(h_TH * sharpness, target_T, mode="fp8_refined")
    exact_T, _ = dense_logp(h_TH * sharpness, weight_VH, target_T)
    torch.testing.assert_close(found.logp_T.double(), exact_T, rtol=1e-5, atol=1e-2 if vocab > 33 else 1e-5)
    assert found.entropy_T.isfinite().all()


def test_a_weight_of_zeros() -> None:
    found = Head(torch.zeros(100, 8)).logprobs(torch.ones(3, 8), torch.tensor([0, 50, 99]), mode="fp8_refined")
    torch.testing.assert_close(found.logp_T, torch.full((3,), 100.0).log().neg())
