"""Stages of tools/gpu_check.sh about the vocabulary head: exact with float64, FP8 with the exact one."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from gpu_rows import Check


def head(check: Check) -> None:
    """The exact head in bfloat16 with dW into main_grad, against float64, at a small and a real shape."""
    from owpo_megatron.bench.head import ExactGradients, HeadProblem
    from owpo_megatron.head import Head
    from owpo_megatron.methods import make_method

    method = make_method("owpo")
    shapes = [(256, 128, 4099), (8192, 4096, 151936)] if check.real else [(64, 32, 515)]
    for tokens, hidden, vocab in shapes:
        dtype = torch.bfloat16 if check.real else torch.float32
        problem = HeadProblem.random(tokens, hidden, vocab, check.device, dtype)
        exact = ExactGradients(problem)
        for main_dtype in (torch.float32, torch.bfloat16):
            h_TH, weight_VH = problem.h_TH.clone().requires_grad_(), problem.weight_VH.clone().requires_grad_()
            weight_VH.main_grad = torch.zeros(weight_VH.shape, dtype=main_dtype, device=check.device)  # type: ignore[attr-defined]
            check.begin_extra()
            out = Head(weight_VH).loss(h_TH, problem.target_T, problem.batch, method)
            out.loss_sum.backward()
            extra = check.extra_bytes()
            again = Head(weight_VH).logprobs(h_TH.detach(), problem.target_T)
            assert h_TH.grad is not None
            error = exact.error(problem, method, (out.loss_sum, h_TH.grad, weight_VH.main_grad))  # type: ignore[attr-defined]
            scale = max(h_TH.grad.abs().max().item(), weight_VH.main_grad.abs().max().item())  # type: ignore[attr-defined]
            bound = (0.02 if check.real or main_dtype == torch.bfloat16 else 1e-3) * scale
            check.row(
                "loss", error < bound, shape=[tokens, hidden, vocab], main_grad=str(main_dtype), max_abs_error=error,
                bound=bound, extra_bytes=extra,
            )  # fmt: skip
            check.row("both passes give the same bits", torch.equal(again.logp_T, out.logp_T))
        del problem, exact


def fp8(check: Check) -> None:
    """The FP8 product against its simulation, and the fused FP8 head against the exact one."""
    from fp8_error_study import synthetic

    from owpo_megatron.bench.head import HeadProblem
    from owpo_megatron.head import Head, head_error
    from owpo_megatron.head.fp8 import _best_product, _Simulated
    from owpo_megatron.methods import make_method

    tokens, hidden, vocab = (4096, 4096, 151936) if check.real else (64, 64, 4096)
    problem = HeadProblem.random(tokens, hidden, vocab, check.device, torch.bfloat16)
    few_CH = problem.h_TH[:19]
    product = _best_product(problem.weight_VH)
    gap = (product(few_CH) - _Simulated(problem.weight_VH)(few_CH)).abs().max().item()
    check.row("FP8 product against its simulation", gap < 0.05, product=type(product).__name__, max_abs_gap=gap)
    h_CH, weight_VH = (value.to(check.device) for value in synthetic("A"))
    target_C = torch.distributions.Categorical(logits=h_CH.float() @ weight_VH.float().t()).sample()
    error = head_error(Head(weight_VH), h_CH, target_C)
    check.row(
        "refined against exact", error.acceptable, mean=error.mean, p99=error.p99, rows=error.rows,
        cosine_dh=error.dh.cosine, cosine_dw=error.dweight.cosine, norm_gap_dh=error.dh.norm_gap,
        norm_gap_dw=error.dweight.norm_gap,
    )  # fmt: skip
    method, found = make_method("owpo"), {}
    for mode in ("exact", "fp8_refined"):
        h_TH, weight_VH = problem.h_TH.clone().requires_grad_(), problem.weight_VH.clone().requires_grad_()
        batch = replace(problem.batch, old_mode=mode, ref_mode=mode)
        check.begin_extra()
        began = time.perf_counter()
        Head(weight_VH).loss(h_TH, problem.target_T, batch, method, mode).loss_sum.backward()
        assert h_TH.grad is not None
        found[mode] = (h_TH.grad.float(), time.perf_counter() - began, check.extra_bytes())
    (exact, *_), (refined, seconds, extra) = found["exact"], found["fp8_refined"]
    cosine = torch.nn.functional.cosine_similarity(exact.flatten().double(), refined.flatten().double(), dim=0).item()
    check.row("one fused step", cosine > 0.999, cosine_dh=cosine, first_call_seconds=seconds, extra_bytes=extra)
