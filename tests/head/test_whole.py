"""OPD over the whole vocabulary through the head, against dense float64 autograd of the KL itself; on two ranks, too.

Not covered: CUDA, where the same torch arithmetic runs in float32.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from head_oracle import assert_same, dense_logp, make_batch, make_head, make_inputs
from rank_pool import Ranks

from owpo_megatron.errors import UserError
from owpo_megatron.head import Head, TeacherRows
from owpo_megatron.methods import check_coupling, make_method
from owpo_megatron.types import TokenBatch

FULL = make_method("opd", vocabulary="full")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one row per chunk": {"chunk_rows": 1},
    "temperature": {"temperature": 0.6, "chunk_rows": 7},
    "padded": {"vocab_size": 33, "chunk_rows": 5},
    "a rank of padding only": {"vocab_size": 15},
    "rows left out": {"mask": True, "chunk_rows": 4},
    "summed over tokens, with an entropy bonus": {"divide_by": "tokens", "entropy_coef": 0.1, "chunk_rows": 4},
}


def inputs(case: str) -> tuple[list[torch.Tensor], TokenBatch, Any, dict[str, Any]]:
    """([h, weight, teacher's h, teacher's weight, target], batch, method, options of the head)."""
    options = dict(CASES[case])
    method = replace(FULL, divide_by=options.pop("divide_by", None), entropy_coef=options.pop("entropy_coef", 0.0))
    h_TH, weight_VH, target_T = make_inputs(vocab=36, rows=24)
    teacher_TH, teacher_VH, _ = make_inputs(vocab=36, rows=24, seed=7)
    target_T %= options.get("vocab_size", 36)
    where = {name: options[name] for name in ("temperature", "vocab_size") if name in options}
    batch = make_batch(dense_logp(h_TH, weight_VH, target_T, **where)[0])
    if options.pop("mask", False):
        batch = replace(batch, row_mask_T=batch.mask_T)
    return [h_TH, weight_VH, teacher_TH, teacher_VH, target_T], batch, method, options


def dense(case: str) -> dict[str, torch.Tensor]:
    """sum of p (log p - log q) over the vocabulary and autograd through it; q has no gradient."""
    (h_TH, weight_VH, teacher_TH, teacher_VH, _), batch, method, options = inputs(case)
    vocab, temperature = options.get("vocab_size"), options.get("temperature", 1.0)
    h_TH, weight_VH = h_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    logp_TV = torch.log_softmax(h_TH @ weight_VH[:vocab].t() / temperature, 1)
    logq_TV = torch.log_softmax(teacher_TH @ teacher_VH[:vocab].t() / temperature, 1)
    kl_T = (logp_TV.exp() * (logp_TV - logq_TV)).sum(1)
    cost_T = kl_T + method.entropy_coef * (logp_TV.exp() * logp_TV).sum(1)
    loss = torch.zeros((), dtype=torch.float64)
    for sample in range(batch.num_samples):
        own_T = batch.mask_T & (batch.sample_T == sample)
        if own_T.any():
            loss = loss + (cost_T[own_T].sum() if method.chosen_divisor == "tokens" else cost_T[own_T].mean())
    dh, dweight = torch.autograd.grad(loss, (h_TH, weight_VH))
    found = {"loss": loss, "dh": dh, "dweight": dweight, "kl": kl_T[batch.mask_T].sum()}
    return {name: value.detach() for name, value in found.items()}


def ours(case: str, rank: int = 0, ranks: int = 1) -> dict[str, torch.Tensor]:
    (h_TH, weight_VH, teacher_TH, teacher_VH, target_T), batch, method, options = inputs(case)
    h_TH = h_TH.clone().requires_grad_()
    weight_VH = weight_VH.chunk(ranks)[rank].clone().requires_grad_()
    shown_RH = teacher_TH if batch.row_mask_T is None else teacher_TH[batch.row_mask_T]
    teacher = TeacherRows(shown_RH, teacher_VH.chunk(ranks)[rank])
    group = dist.group.WORLD if ranks > 1 else None
    out = make_head(weight_VH, options.pop("vocab_size", None), group, **options).loss(
        h_TH, target_T, batch, method, teacher=teacher
    )
    dh, dweight = torch.autograd.grad(out.loss_sum, (h_TH, weight_VH))
    found = {"loss": out.loss_sum, "dh": dh, "dweight": dweight, "kl": out.metrics["kl_whole_sum"]}
    return {name: value.detach() for name, value in found.items()}


@pytest.mark.parametrize("case", [name for name in CASES if name != "a rank of padding only"])
def test_loss_and_gradients_equal_dense(case: str) -> None:
    assert_same(ours(case), dense(case))


def run_rank(folder: str) -> None:
    dist.init_process_group("gloo")
    torch.save({case: ours(case, dist.get_rank(), 2) for case in CASES}, f"{folder}/rank{dist.get_rank()}.pt")


@pytest.mark.ranks
def test_two_ranks_equal_dense(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, run_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for case in CASES:
        assert torch.equal(first[case]["loss"], second[case]["loss"]), case
        found = first[case] | {
            "dh": first[case]["dh"] + second[case]["dh"],
            "dweight": torch.cat([first[case]["dweight"], second[case]["dweight"]]),
        }
        assert_same(found, dense(case))


def test_by_hand() -> None:
    """p = (1/4, 3/4), q = (1/2, 1/2): KL = log 2 - H(p) = 3/4 log 3 - log 2; its slope in the first logit is
    p_1 (log(p_1 / q_1) - KL) = -1/4 (log 2 + KL)."""
    h = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64, requires_grad=True)
    teacher = TeacherRows(torch.ones(1, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64))
    zero = torch.zeros(1, dtype=torch.float64)
    batch = make_batch(zero, torch.ones(1, dtype=torch.bool))
    out = Head(weight).loss(h, torch.tensor([0]), batch, FULL, teacher=teacher)
    kl = 0.75 * math.log(3) - math.log(2)
    assert out.loss_sum.item() == pytest.approx(kl, abs=1e-15)
    (slope,) = torch.autograd.grad(out.loss_sum, weight)
    first = -0.25 * (math.log(2) + kl)
    assert slope[:, 0].tolist() == pytest.approx([first, -first], abs=1e-15)


def test_the_sampled_form_has_this_gradient_as_its_mean() -> None:
    """One place, every token in turn, weighed by its probability: the mean of the sampled form's gradients at r = 1."""
    h_TH, weight_VH, _ = make_inputs(rows=1)
    teacher_TH, teacher_VH, _ = make_inputs(rows=1, seed=7)
    mean_VH, sampled = torch.zeros_like(weight_VH), make_method("opd")
    for token in range(len(weight_VH)):
        target_T = torch.tensor([token])
        logp_T, ref_T = (dense_logp(*one, target_T)[0] for one in ((h_TH, weight_VH), (teacher_TH, teacher_VH)))
        batch = replace(make_batch(logp_T, torch.ones(1, dtype=torch.bool)), old_logp_T=logp_T, ref_logp_T=ref_T)
        leaf_VH = weight_VH.clone().requires_grad_()
        (slope_VH,) = torch.autograd.grad(Head(leaf_VH).loss(h_TH, target_T, batch, sampled).loss_sum, leaf_VH)
        mean_VH += logp_T.exp() * slope_VH
    leaf_VH = weight_VH.clone().requires_grad_()
    out = Head(leaf_VH).loss(h_TH, target_T, batch, FULL, teacher=TeacherRows(teacher_TH, teacher_VH))
    torch.testing.assert_close(torch.autograd.grad(out.loss_sum, leaf_VH)[0], mean_VH, rtol=1e-12, atol=1e-12)


def test_a_teacher_goes_with_the_whole_vocabulary_and_nothing_else() -> None:
    h_TH, weight_VH, target_T = make_inputs()
    batch, teacher = make_batch(dense_logp(h_TH, weight_VH, target_T)[0]), TeacherRows(h_TH, weight_VH)
    with pytest.raises(TypeError, match="opd: a teacher's rows go with a method"):
        Head(weight_VH).loss(h_TH, target_T, batch, FULL)
    with pytest.raises(TypeError, match="opd: a teacher's rows go with a method"):
        Head(weight_VH).loss(h_TH, target_T, batch, make_method("opd"), teacher=teacher)
    check_coupling(FULL)
    with pytest.raises(UserError, match="algorithm.vocabulary = all: must be one of sampled, full"):
        make_method("opd", vocabulary="all")
