"""Triton epilogues and the backend made of them: interpreted on a CPU, compiled on a GPU.

The interpreter checks logic and masking. Not covered by it: races, speed, and bfloat16 operands of the GEMMs, which are
float32 there; the same cases run compiled where CUDA is (marked gpu). test_triton.py starts this file.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from head_oracle import assert_same, dense, dense_logp, dense_statistic, make_batch, make_inputs
from test_logprob import logprob, peaked_inputs

from owpo_megatron.head import Fp8Weight, Head, VocabShard, triton_ops
from owpo_megatron.head.fp8 import quantise
from owpo_megatron.head.tail import Moments
from owpo_megatron.head.triton_fp8 import TritonFp8Backend
from owpo_megatron.methods import make_method
from owpo_megatron.methods.statistic import MeanLogProb, MinPLogProb, Statistic

INTERPRETED = not torch.cuda.is_available()
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="no CUDA device")])
CPU = pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="compiled on CUDA instead"))
on_each_device = pytest.mark.parametrize("device", [CPU, GPU])


def in_padded_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The same values in the head's buffers, whose padding is whatever memory held: NaN here."""
    padded = triton_ops.rows_of(*matrix.shape, matrix.dtype, matrix.device)
    whole = padded.as_strided((len(matrix), padded.stride(0)), padded.stride()).fill_(torch.nan)
    whole[:, : matrix.shape[1]] = matrix
    return padded


@on_each_device
@pytest.mark.parametrize("columns", [(0, 300), (0, 140), (140, 300), (299, 300), (0, 2500)], ids=str)
def test_row_stats(device: str, columns: tuple[int, int]) -> None:
    """Whole and part of a vocabulary: targets of other ranks, padded lanes of the last tile, one column; more tiles
    than a program takes at a time, with the largest logit among the first or the last."""
    h_TH, weight_VH, target_T = make_inputs(rows=9, vocab=max(columns[1], 300), dtype=torch.float32)
    logits_CV = (h_TH @ weight_VH.t())[:, columns[0] : columns[1]].contiguous().to(device)
    here_T = (target_T >= columns[0]) & (target_T < columns[1])
    column_T = torch.where(here_T, target_T - columns[0], -1).to(device)
    out_4C, best_CN, column_CN = triton_ops.row_stats(logits_CV, column_T, 0.7, candidates=True)
    z = logits_CV.double() * 0.7
    shifted = z - z.amax(1, keepdim=True)
    expected = torch.stack(
        [
            z.amax(1),
            shifted.exp().sum(1),
            z.gather(1, column_T.clamp(min=0)[:, None])[:, 0] * here_T.to(device),
            (shifted * shifted.exp()).sum(1),
        ]
    )
    torch.testing.assert_close(out_4C.double(), expected, rtol=2e-6, atol=2e-6)
    padded_out, padded_best, _ = triton_ops.row_stats(in_padded_rows(logits_CV), column_T, 0.7, candidates=True)
    assert torch.equal(padded_out, out_4C) and torch.equal(padded_best, best_CN), "the padding is never read"
    assert best_CN is not None and column_CN is not None
    for tile, part in enumerate(z.split(triton_ops.TILE, dim=1)):
        torch.testing.assert_close(best_CN[:, tile].double(), part.amax(1), rtol=1e-6, atol=1e-6)
        assert torch.equal(column_CN[:, tile].long(), part.argmax(1) + tile * triton_ops.TILE)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_dlogits(device: str, dtype: torch.dtype, with_entropy: bool) -> None:
    h_TH, weight_VH, target_T = make_inputs(rows=9, vocab=2101, dtype=torch.float32)
    logits_CV = (h_TH @ weight_VH.t()).to(device)
    target_T = target_T.to(device)
    column_T = target_T.masked_fill(torch.arange(9, device=device) == 2, -1)
    z = logits_CV.double() * 0.7
    log_p = torch.log_softmax(z, 1)
    entropy_T = -(log_p.exp() * log_p).sum(1)
    dlogp_T, dentropy_T = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).to(device)
    keep_K = torch.tensor([0, 2, 3, 8], device=device)
    expected = -log_p.exp() * dlogp_T[:, None]
    if with_entropy:
        expected -= log_p.exp() * (log_p + entropy_T[:, None]) * dentropy_T[:, None]
    for row in range(9):
        if column_T[row] >= 0:
            expected[row, column_T[row]] += dlogp_T[row]
    found = triton_ops.dlogits(
        in_padded_rows(logits_CV), keep_K, column_T, torch.logsumexp(z, 1).float(), entropy_T.float(), dlogp_T,
        dentropy_T if with_entropy else None, 0.7, dtype,
    )  # fmt: skip
    assert found.dtype == dtype
    # the interpreter cuts bfloat16 off instead of rounding it
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(found.double(), 0.7 * expected[keep_K], **tolerance)


@on_each_device
def test_gather_dot(device: str) -> None:
    h_TH, weight_VH, _ = make_inputs(rows=5, hidden=1100, vocab=50, dtype=torch.float32)
    column_CN = torch.randint(0, 50, (5, 3), generator=torch.Generator().manual_seed(0))
    found = triton_ops.gather_dot(h_TH.to(device), weight_VH.to(device), column_CN.to(device))
    expected = torch.einsum("cnh,ch->cn", weight_VH.double()[column_CN], h_TH.double())
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-4)


@on_each_device
@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
def test_head_of_triton_equals_dense(device: str, entropy_coef: float) -> None:
    """Two chunks, masked rows, a temperature, float32 inputs."""
    h_TH, weight_VH, target_T = make_inputs(rows=12, vocab=150, dtype=torch.float32)
    batch = make_batch(dense_logp(h_TH, weight_VH, target_T, 0.8)[0])
    method = make_method("owpo", entropy_coef=entropy_coef)
    expected = dense(h_TH, weight_VH, target_T, batch, method, temperature=0.8)
    moved = {key: value.to(device) for key, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    batch = replace(batch, **moved)
    h, weight = (value.to(device).requires_grad_() for value in (h_TH, weight_VH))
    head = Head(weight, temperature=0.8, chunk_rows=7, backend="triton")
    out = head.loss(h, target_T.to(device), replace(batch, row_mask_T=batch.mask_T), method)
    out.loss_sum.backward()
    found = {"loss": out.loss_sum.detach(), "dh": h.grad, "dweight": weight.grad}
    assert_same({k: v.cpu() for k, v in found.items()}, {k: expected[k] for k in found}, 1e-4)
    torch.testing.assert_close(out.logp_T.cpu().double(), expected["logp"] * batch.mask_T.cpu(), rtol=0, atol=2e-6)
    plain = head.logprobs(h.detach(), target_T.to(device), batch.mask_T)
    assert torch.equal(plain.logp_T, out.logp_T)


@on_each_device
@pytest.mark.parametrize("statistic", [MeanLogProb(), MinPLogProb(0.05)], ids=str)
def test_a_further_statistic_of_triton_equals_dense(device: str, statistic: Statistic) -> None:
    h_TH, weight_VH, target_T = make_inputs(rows=12, vocab=150, dtype=torch.float32)
    rows = torch.log_softmax(h_TH.double() @ weight_VH.double().t() / 0.8, dim=1)
    expected = dense_statistic(statistic, rows, rows.gather(1, target_T[:, None])[:, 0])
    head = Head(weight_VH.to(device), temperature=0.8, chunk_rows=7, backend="triton")
    found = head.logprobs(h_TH.to(device), target_T.to(device), statistic=statistic).statistic_T
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-5)


@on_each_device
def test_fp8_of_triton_refines_as_the_reference_does(device: str) -> None:
    """The statistics are corrected instead of summed again, and candidates are one a tile: nearly the same numbers."""
    h_TH, weight_VH, target_T = (value.to(device) for value in peaked_inputs(rows=24))
    exact = logprob(h_TH, weight_VH, target_T, backend="torch")
    raw = logprob(h_TH, weight_VH, target_T, mode="fp8_raw", backend="triton")
    refined = logprob(h_TH, weight_VH, target_T, mode="fp8_refined", backend="triton", temperature=1.0)
    reference = logprob(h_TH, weight_VH, target_T, mode="fp8_refined", backend="torch")
    error, reference_error, raw_error = (
        (found.logp_T - exact.logp_T).abs().mean().item() for found in (refined, reference, raw)
    )
    assert raw_error > 5 * error and error < reference_error + 2e-3
    assert (refined.entropy_T - exact.entropy_T).abs().mean() < (raw.entropy_T - exact.entropy_T).abs().mean()


@on_each_device
def test_refining_every_tile_of_one_column_is_exact(device: str) -> None:
    """A target that is a candidate too is exchanged once, one of another rank not at all."""
    from owpo_megatron.head.shard import VocabShard
    from owpo_megatron.head.triton_fp8 import RefinedLogits

    exact_CV = torch.randn(6, 1, generator=torch.Generator().manual_seed(0)).to(device)
    column_C = torch.tensor([0, -1, 0, 0, -1, 0], device=device)
    logits = RefinedLogits(
        exact_CV + 0.1, column_C, 0.5, torch.float32, lambda column_CN: exact_CV.expand_as(column_CN), None
    )
    out_4C = logits.stats()
    torch.testing.assert_close(out_4C[0] + out_4C[1].log(), 0.5 * exact_CV[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(out_4C[2], 0.5 * exact_CV[:, 0] * (column_C >= 0), rtol=0, atol=1e-6)
    assert VocabShard(1).combine(out_4C).entropy_C.abs().max() < 1e-5


@on_each_device
@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
def test_the_fp8_loss_of_triton_is_that_of_its_own_logits(device: str, entropy_coef: float) -> None:
    """Every tile has one column: all of them are refined, so the loss and both gradients are the exact ones."""
    h_TH, weight_VH, target_T = make_inputs(rows=12, vocab=30, dtype=torch.float32)
    spread_VH = torch.zeros(30 * triton_ops.TILE, 8)
    spread_VH[:: triton_ops.TILE] = weight_VH
    spread_T = target_T * triton_ops.TILE
    batch = make_batch(dense_logp(h_TH, spread_VH, spread_T, 0.8)[0])
    method = make_method("owpo", entropy_coef=entropy_coef)
    expected = dense(h_TH, spread_VH, spread_T, batch, method, temperature=0.8)
    moved = {key: value.to(device) for key, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    batch = replace(batch, **moved, old_mode="fp8_refined", ref_mode="fp8_refined")
    h, weight = (value.to(device).requires_grad_() for value in (h_TH, spread_VH))
    head = Head(weight, temperature=0.8, chunk_rows=7, backend="triton")
    out = head.loss(h, spread_T.to(device), batch, method, "fp8_refined")
    out.loss_sum.backward()
    found = {"loss": out.loss_sum.detach(), "dh": h.grad, "dweight": weight.grad}
    assert_same({k: v.cpu() for k, v in found.items()}, {k: expected[k] for k in found}, 2e-4)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_moments_of_a_tail(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows and channels than a program looks at together, and a stride that is not theirs."""
    monkeypatch.setattr(triton_ops, "MOMENT_ROWS", 16)
    h_TH, weight_VH, _ = make_inputs(rows=9, hidden=2 * triton_ops.TAIL_BLOCK + 8, vocab=50, dtype=dtype)
    parts = (weight_VH.to(device), *quantise(weight_VH.to(device)))
    moments = Moments.of(*parts)
    of_kernel = vars(triton_ops.weight_moments(*parts))
    for name, expected in vars(moments).items():
        torch.testing.assert_close(of_kernel[name], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    values_TH, scale = quantise(h_TH.to(device))
    quantised_TH = values_TH.float() * scale
    strided_TH = torch.cat([h_TH, h_TH], dim=1).to(device)[:, : h_TH.shape[1]]
    found = vars(triton_ops.tail_error(strided_TH, quantised_TH, moments))
    for name, expected in vars(moments.of_rows(h_TH.to(device), quantised_TH)).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@on_each_device
@pytest.mark.parametrize("shards", [1, 2])
def test_the_gradient_of_a_shifted_tail_is_that_of_its_softmax(device: str, shards: int) -> None:
    """Most columns stay in FP8: the statistics of all shards and the logits in memory are of one distribution."""
    h_TH, weight_VH, target_T = (value.to(device) for value in make_inputs(rows=6, vocab=600, dtype=torch.float32))
    local = len(weight_VH) // shards
    chunks, parts = [], []
    for start in range(0, len(weight_VH), local):
        part_VH = weight_VH[start : start + local]
        here_T = (target_T >= start) & (target_T < start + local)
        column_T = torch.where(here_T, target_T - start, -1)
        backend = TritonFp8Backend(part_VH, Fp8Weight(part_VH), 0.8, refine=True)
        (logits,) = backend.chunks(h_TH, column_T, [slice(0, 6)])
        logits._candidates = 2
        chunks.append(logits)
        parts.append(logits.stats())
    shift = torch.stack([logits._shift_C for logits in chunks])
    assert 1e-5 < shift.abs().max() < 0.1 and shift.unique().numel() == shift.numel()
    stats = VocabShard.combined(torch.stack(parts))
    dlogits = torch.cat([one.dlogits(None, stats, torch.ones(6, device=device), None) for one in chunks], dim=1)
    torch.testing.assert_close(dlogits.sum(dim=1), torch.zeros(6, device=device), rtol=0, atol=2e-6)
    at_target = dlogits.gather(1, target_T[:, None])[:, 0] / 0.8
    torch.testing.assert_close(1 - at_target, stats.logp_C.exp(), rtol=1e-5, atol=1e-6)
    p_TV = -dlogits / 0.8
    p_TV.scatter_add_(1, target_T[:, None], torch.ones(6, 1, device=device))
    torch.testing.assert_close(-(p_TV * p_TV.clamp(min=1e-30).log()).sum(1), stats.entropy_C, rtol=1e-4, atol=1e-5)
    for logits, part in zip(chunks, p_TV.split(local, dim=1), strict=True):
        for block, logp_BV in logits.log_probs(stats):
            torch.testing.assert_close(logp_BV.exp(), part[block], rtol=1e-4, atol=1e-7)
