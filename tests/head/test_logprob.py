"""Log-probs without gradients, exact and FP8, and the types that carry how they were computed.

FP8 products are simulated here (operands rounded to e4m3, float32 GEMM); the GEMMs of a GPU are not covered.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from head_oracle import dense_logp, make_head, make_inputs
from rank_pool import Ranks

from owpo_megatron.head import (
    ExactLogProbs,
    Head,
    LogProbs,
    RawLogProbs,
    RefinedLogProbs,
    head_error,
    settled_mode,
)
from owpo_megatron.head.fp8 import _ScaledMm, _Simulated
from owpo_megatron.head.fp8_check import Overlap


def logprob(h_TH, weight_VH, target_T, row_mask_T=None, mode="exact", **options) -> LogProbs:
    return make_head(weight_VH, **options).logprobs(h_TH, target_T, row_mask_T, mode)


@pytest.mark.parametrize("chunk_rows", [1, 7, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_float64_equals_dense(chunk_rows: int | None, temperature: float) -> None:
    h_TH, weight_VH, target_T = make_inputs()
    found = logprob(h_TH, weight_VH, target_T, temperature=temperature, chunk_rows=chunk_rows)
    logp_T, entropy_T = dense_logp(h_TH, weight_VH, target_T, temperature)
    torch.testing.assert_close(found.logp_T, logp_T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.entropy_T, entropy_T, rtol=1e-12, atol=1e-12)
    lse_T = torch.logsumexp(h_TH @ weight_VH.t() / temperature, 1)
    torch.testing.assert_close(found.lse_T, lse_T, rtol=1e-12, atol=1e-12)
    assert isinstance(found, ExactLogProbs) and found.mode == "exact"


def test_worked_by_hand() -> None:
    # logits (0, log 3), p = (1/4, 3/4): logp of column 0 is -log 4; entropy = log 4 - (3/4) log 3
    weight = torch.tensor([[1.0], [3.0]], dtype=torch.float64).log()
    found = logprob(torch.ones(1, 1, dtype=torch.float64), weight, torch.tensor([0]))
    log3, log4 = torch.tensor([3.0, 4.0], dtype=torch.float64).log().tolist()
    assert found.logp_T.item() == pytest.approx(-log4, abs=1e-15)
    assert found.entropy_T.item() == pytest.approx(log4 - 0.75 * log3, abs=1e-15)
    assert found.lse_T.item() == pytest.approx(log4, abs=1e-15)


def test_large_logits_neither_overflow_nor_lose_digits() -> None:
    """A certain token's log-prob is about -1e-8: logits near 1000 must not round it away in float64."""
    h = torch.tensor([[1000.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [1.0 - 0.0184]], dtype=torch.float64)
    found = logprob(h, weight, torch.tensor([0]))
    expected = -torch.log1p(torch.exp(torch.tensor(-18.4, dtype=torch.float64)))
    assert found.logp_T.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.entropy_T.item() == pytest.approx((19.4 * torch.exp(torch.tensor(-18.4))).item(), rel=1e-4)


def test_mask_and_padding() -> None:
    h_TH, weight_VH, target_T = make_inputs(vocab=40)
    weight_VH[37:] = 100.0
    mask_T = torch.arange(23) % 3 != 0
    unread_T = torch.where(mask_T, target_T % 37, torch.full_like(target_T, 10**9))
    found = logprob(h_TH, weight_VH, unread_T, row_mask_T=mask_T, vocab_size=37, chunk_rows=4)
    expected = dense_logp(h_TH, weight_VH, target_T % 37, vocab_size=37)
    for ours, theirs in zip((found.logp_T, found.entropy_T), expected, strict=True):
        torch.testing.assert_close(ours, theirs * mask_T, rtol=1e-12, atol=1e-12)
    assert not found.lse_T[~mask_T].any()
    nothing = logprob(h_TH, weight_VH, unread_T, row_mask_T=torch.zeros(23, dtype=torch.bool))
    assert nothing.logp_T.shape == (23,) and not nothing.logp_T.any()
    with pytest.raises(AssertionError, match="1 ranks of 40 rows cannot hold a vocabulary of 41"):
        logprob(h_TH, weight_VH, target_T, vocab_size=41)


# ------------------------------------------------------------------------------------------------------ FP8
def peaked_inputs(rows: int = 256, hidden: int = 96, vocab: int = 2000):
    """bf16 inputs whose distributions look like a language model's: some certain, some spread; sampled targets."""
    generator = torch.Generator().manual_seed(3)
    weight_VH = torch.randn(vocab, hidden, generator=generator) / hidden**0.5
    best_T = torch.randint(0, vocab, (rows,), generator=generator)
    h_TH = torch.randn(rows, hidden, generator=generator)
    h_TH += weight_VH[best_T] * torch.linspace(7, 16, rows)[:, None]
    h_TH, weight_VH = h_TH.bfloat16(), weight_VH.bfloat16()
    p_TV = torch.softmax(h_TH.float() @ weight_VH.float().t(), 1)
    return h_TH, weight_VH, torch.multinomial(p_TV, 1, generator=generator)[:, 0]


def test_refinement_takes_the_error_of_fp8_away() -> None:
    h_TH, weight_VH, target_T = peaked_inputs()
    exact_T = logprob(h_TH, weight_VH, target_T).logp_T
    torch.testing.assert_close(exact_T.double(), dense_logp(h_TH, weight_VH, target_T)[0], rtol=0, atol=1e-5)
    raw = logprob(h_TH, weight_VH, target_T, mode="fp8_raw")
    refined = logprob(h_TH, weight_VH, target_T, mode="fp8_refined")
    raw_error, refined_error = ((found.logp_T - exact_T).abs().mean().item() for found in (raw, refined))
    assert raw_error > 0.01
    assert refined_error < 1e-3 and refined_error < raw_error / 15
    assert (type(raw), type(refined)) == (RawLogProbs, RefinedLogProbs)


def test_all_columns_refined_is_exact() -> None:
    """Nothing is left to FP8 with no more columns than candidates."""
    h_TH, weight_VH, target_T = make_inputs(vocab=32, dtype=torch.float32)
    found = logprob(h_TH, weight_VH, target_T, mode="fp8_refined", temperature=0.7)
    logp_T, entropy_T = dense_logp(h_TH, weight_VH, target_T, temperature=0.7)
    torch.testing.assert_close(found.logp_T.double(), logp_T, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.entropy_T.double(), entropy_T, rtol=0, atol=1e-5)


def test_a_head_quantises_its_weight_once() -> None:
    h_TH, weight_VH, target_T = peaked_inputs(rows=32)
    head = Head(weight_VH)
    first = head.logprobs(h_TH, target_T, mode="fp8_raw").logp_T
    weight_VH *= 2
    assert torch.equal(head.logprobs(h_TH, target_T, mode="fp8_raw").logp_T, first)
    assert not torch.equal(Head(weight_VH).logprobs(h_TH, target_T, mode="fp8_raw").logp_T, first)


@pytest.mark.parametrize("rows", [1, 16, 19])
def test_torchs_fp8_gemm_is_what_is_simulated(rows: int) -> None:
    """Any number of rows: the GEMM's own wants are met inside. torch has it on a CPU too, unused."""
    h_TH, weight_VH, _ = peaked_inputs(rows=rows, vocab=48)
    torch.testing.assert_close(_ScaledMm(weight_VH)(h_TH), _Simulated(weight_VH)(h_TH), rtol=1e-5, atol=1e-5)


def test_an_odd_vocabulary_and_hidden_size_are_padded_inside() -> None:
    h_TH, weight_VH, _ = peaked_inputs(rows=5, hidden=90, vocab=47)
    found_TV = _ScaledMm(weight_VH)(h_TH)
    assert found_TV.shape == (5, 47)
    torch.testing.assert_close(found_TV, _Simulated(weight_VH)(h_TH), rtol=1e-5, atol=1e-5)


def test_ratios_between_incompatible_modes_are_refused() -> None:
    h_TH, weight_VH, target_T = peaked_inputs(rows=32)
    exact = logprob(h_TH, weight_VH, target_T)
    refined = logprob(h_TH, weight_VH, target_T, mode="fp8_refined")
    raw = logprob(h_TH, weight_VH, target_T, mode="fp8_raw")
    assert torch.equal(exact.log_ratio(refined), exact.logp_T - refined.logp_T)
    assert not refined.log_ratio(refined).any()
    for comparable in (exact, refined):
        with pytest.raises(TypeError, match="fp8_raw"):
            comparable.log_ratio(raw)
    assert not hasattr(raw, "log_ratio")


def test_the_guard_falls_back_loudly(caplog: pytest.LogCaptureFixture) -> None:
    """A vocabulary of a few candidates passes; one with 60 near copies of a column, of which 32 are exact, does not."""
    h_TH, weight_VH, target_T = make_inputs(rows=300, vocab=32, dtype=torch.float32)
    good = head_error(Head(weight_VH, chunk_rows=100), h_TH, target_T)
    assert settled_mode([good]) == "fp8_refined" and good.acceptable and good.rows == 256
    assert good.dh.cosine > 0.999999 and good.dweight.norm_gap < 1e-6 and good.dh.exact > 1
    assert not caplog.records
    turned = replace(good, dweight=Overlap(1.0, 1.0, 0.999))
    assert settled_mode([turned], loud=False) == "exact", "log-probs are right, the gradient is not"
    h_TH, weight_VH, target_T = make_inputs(rows=64, hidden=64, vocab=3000, dtype=torch.float32)
    weight_VH = weight_VH[:50].repeat(60, 1) + 0.03 * weight_VH
    mask_T = torch.arange(64) < 40
    bad = head_error(Head(weight_VH), h_TH * 0.5, target_T, mask_T)
    assert settled_mode([bad], loud=False) == "exact" and not caplog.records, "one rank logs, not all"
    assert settled_mode([bad]) == "exact" and bad.rows == 40 and bad.mean > 5e-4
    assert "NOT used" in caplog.text
    nothing = head_error(Head(weight_VH), h_TH, target_T, torch.zeros_like(mask_T))
    assert settled_mode([nothing]) == "exact", "no token to judge by"
    assert settled_mode([nothing, good]) == "fp8_refined", "a data-parallel rank without tokens does not count"
    assert settled_mode([good, bad]) == "exact", "all ranks or none"


# ------------------------------------------------------------------------------------------------ two ranks
def run_rank(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    h_TH, weight_VH, target_T = peaked_inputs(rows=64)
    results = {
        mode: logprob(h_TH, weight_VH.chunk(2)[rank], target_T, mode=mode, group=dist.group.WORLD, chunk_rows=10)
        for mode in ("exact", "fp8_refined")
    }
    torch.save({mode: (found.logp_T, found.entropy_T) for mode, found in results.items()}, f"{folder}/rank{rank}.pt")


def test_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """Each rank refines the best of its own columns, and its target's."""
    ranks.run(2, run_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    h_TH, weight_VH, target_T = peaked_inputs(rows=64)
    logp_T, entropy_T = dense_logp(h_TH, weight_VH, target_T)
    for mode, tolerance in (("exact", 1e-5), ("fp8_refined", 2e-2)):
        assert all(torch.equal(a, b) for a, b in zip(first[mode], second[mode], strict=True))
        torch.testing.assert_close(first[mode][0].double(), logp_T, rtol=0, atol=tolerance)
        torch.testing.assert_close(first[mode][1].double(), entropy_T, rtol=0, atol=10 * tolerance)
