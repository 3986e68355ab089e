"""The training head against the dense float64 oracle: every method, one rank and two, with and without main_grad.

Not covered here: CUDA; the reduction of the partial gradient of h by megatron's regions (its sum is checked; the
parallel room's parity tests run it with and without sequence parallelism).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from coupled_methods import NINE
from head_oracle import assert_same, dense, dense_logp, make_batch, make_head, make_inputs
from rank_pool import Ranks

from owpo_megatron.head import Head, backend
from owpo_megatron.methods import catalogue, dense_loss, make_method

METHODS = {name: catalogue()[name]() for name in NINE}  # all of them: test_seam.py
OWPO = METHODS["owpo"]


def ours(h_TH, weight_VH, target_T, batch, method, upstream=1.0, **options: Any) -> dict[str, torch.Tensor]:
    h_TH, weight_VH = h_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    out = make_head(weight_VH, **options).loss(h_TH, target_T, batch, method)
    dh, dweight = torch.autograd.grad(upstream * out.loss_sum, (h_TH, weight_VH))
    return {
        "loss": out.loss_sum.detach(), "logp": out.logp_T, "entropy": out.entropy_T, "dh": dh, "dweight": dweight,
    }  # fmt: skip


def make_case(**fields: Any):
    """Return (h, weight, target, batch) whose old and reference are near the policy."""
    h_TH, weight_VH, target_T = make_inputs(**fields)
    return h_TH, weight_VH, target_T, make_batch(dense_logp(h_TH, weight_VH, target_T)[0])


@pytest.mark.parametrize("chunk_rows", [1, 7, None])
@pytest.mark.parametrize("entropy_bonus", [0.0, 0.3])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_equals_dense(name: str, entropy_bonus: float, chunk_rows: int | None) -> None:
    case = make_case()
    method = make_method(name, entropy_coef=entropy_bonus)
    expected = dense(*case, method, upstream=1.7)
    assert expected["dh"].abs().max() > 1e-3
    actual = ours(*case, method, upstream=1.7, chunk_rows=chunk_rows)
    assert_same(actual, expected)


@pytest.mark.parametrize("name", ["owpo", "dapo", "owpo_no_asym"])
def test_rows_may_be_split_over_ranks(name: str) -> None:
    """Context parallelism as the head sees it: parts of the rows, in any order, add up to the whole.

    Only for methods that count tokens: those that average over a sample first need the whole sample.
    """
    h_TH, weight_VH, target_T, batch = make_case()
    whole = ours(h_TH, weight_VH, target_T, batch, METHODS[name])
    dh, dweight, loss = torch.zeros_like(h_TH), torch.zeros_like(weight_VH), torch.zeros((), dtype=torch.float64)
    chosen_T = torch.zeros(len(h_TH), dtype=torch.bool)
    chosen_T[[0, 5, 6, 7, 20, 22]] = True
    for rows in (chosen_T, ~chosen_T):
        tokens = {n: value[rows] for n, value in vars(batch).items() if n.endswith("_T") and value is not None}
        part = ours(h_TH[rows], weight_VH, target_T[rows], replace(batch, **tokens), METHODS[name])
        dh[rows] = part["dh"]
        dweight += part["dweight"]
        loss += part["loss"]
    assert_same({"dh": dh, "dweight": dweight, "loss": loss}, {key: whole[key] for key in ("dh", "dweight", "loss")})


@pytest.mark.parametrize("temperature", [0.6, 2.5])
def test_temperature(temperature: float) -> None:
    h_TH, weight_VH, target_T = make_inputs()
    batch = make_batch(dense_logp(h_TH, weight_VH, target_T, temperature)[0])
    for bonus in (0.0, 0.2):
        method = make_method("owpo", entropy_coef=bonus)
        expected = dense(h_TH, weight_VH, target_T, batch, method, temperature=temperature)
        actual = ours(h_TH, weight_VH, target_T, batch, method, temperature=temperature)
        assert_same(actual, expected)


def test_only_rows_with_gradient_are_kept() -> None:
    """Masked, advantage zero, clipped: gone before the backward GEMMs, with the same gradients; k3 keeps the zeros."""
    h_TH, weight_VH, target_T, batch = make_case(rows=60)
    for name, whole in (("owpo", False), ("sym_dapo", True)):
        objective = METHODS[name]
        h, weight = h_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
        masked = replace(batch, row_mask_T=batch.mask_T)
        out = Head(weight, chunk_rows=16).loss(h, target_T, masked, objective)
        logp_T = out.logp_T.clone().requires_grad_()
        (gradient_T,) = torch.autograd.grad(dense_loss(objective, logp_T, batch).loss_sum, logp_T)
        assert (out.rows.total, out.rows.forward) == (60, int(batch.mask_T.sum()))
        assert out.rows.gradient == int((gradient_T != 0).sum())
        clipped = int(out.metrics["clip_count"])
        zeros = int((batch.mask_T & (batch.advantage_T == 0)).sum())
        assert clipped and zeros
        if not whole:
            assert out.rows.gradient == out.rows.forward - clipped - zeros
        else:
            assert out.rows.gradient == out.rows.forward
        everything = dense(h_TH, weight_VH, target_T, batch, objective)
        everything = {key: everything[key] for key in ("loss", "dh", "dweight")}
        assert_same(ours(h_TH, weight_VH, target_T, masked, objective), everything)
    # an entropy bonus gives every row of the mask a gradient
    bonus = Head(weight_VH).loss(h_TH.clone().requires_grad_(), target_T, batch, make_method("owpo", entropy_coef=0.1))
    assert bonus.rows.gradient == int(batch.mask_T.sum())


def test_row_mask_leaves_rows_out_of_everything() -> None:
    h_TH, weight_VH, target_T, batch = make_case()
    expected = dense(h_TH, weight_VH, target_T, batch, OWPO)
    expected["logp"], expected["entropy"] = expected["logp"] * batch.mask_T, expected["entropy"] * batch.mask_T
    unread_T = torch.where(batch.mask_T, target_T, torch.full_like(target_T, 10**9))
    actual = ours(h_TH, weight_VH, unread_T, replace(batch, row_mask_T=batch.mask_T), OWPO, chunk_rows=4)
    assert_same(actual, expected)
    assert not actual["dh"][~batch.mask_T].any()


def test_nothing_in_the_mask() -> None:
    h_TH, weight_VH, target_T, batch = make_case()
    nothing_T = torch.zeros_like(batch.mask_T)
    actual = ours(h_TH, weight_VH, target_T, replace(batch, mask_T=nothing_T, row_mask_T=nothing_T), OWPO)
    assert [actual[name].shape for name in ("dh", "dweight")] == [(23, 8), (37, 8)]
    assert not any(value.any() for value in actual.values())


def test_padded_vocabulary_takes_no_part() -> None:
    h_TH, weight_VH, target_T = make_inputs(vocab=40)
    weight_VH[37:] = 100.0  # would win every softmax
    target_T %= 37
    batch = make_batch(dense_logp(h_TH, weight_VH, target_T, vocab_size=37)[0])
    method = make_method("owpo", entropy_coef=0.1)
    actual = ours(h_TH, weight_VH, target_T, batch, method, vocab_size=37, chunk_rows=5)
    assert_same(actual, dense(h_TH, weight_VH, target_T, batch, method, vocab_size=37))
    assert not actual["dweight"][37:].any()


@pytest.mark.parametrize(("dtype", "gradient_error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_inputs_are_computed_in_float32(dtype: torch.dtype, gradient_error: float) -> None:
    """bfloat16: the log-prob error stays at float32's size, and gradients only round at the end."""
    case = make_case(rows=40, hidden=32, vocab=300, dtype=dtype)
    actual, expected = ours(*case, OWPO, chunk_rows=16), dense(*case, OWPO)
    assert actual["logp"].dtype == actual["entropy"].dtype == torch.float32
    assert actual["dh"].dtype == actual["dweight"].dtype == dtype
    for name in ("logp", "entropy"):
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=0, atol=2e-5)
    for name in ("dh", "dweight"):
        assert ((actual[name].double() - expected[name]).norm() / expected[name].norm()).item() < gradient_error


def test_same_bits_as_a_pass_without_gradients() -> None:
    """The reference's pass and the policy's give the same numbers, which keeps w at exactly 1 after a swap."""
    h_TH, weight_VH, target_T, batch = make_case(rows=50, dtype=torch.float32)
    for mask_T in (None, batch.mask_T):
        for chunk in (None, 7):
            head = Head(weight_VH, chunk_rows=chunk)
            out = head.loss(h_TH.clone().requires_grad_(), target_T, replace(batch, row_mask_T=mask_T), OWPO)
            plain = head.logprobs(h_TH, target_T, mask_T)
            assert torch.equal(out.logp_T, plain.logp_T) and torch.equal(out.entropy_T, plain.entropy_T)


def test_old_is_the_policy_where_no_pass_was_spent() -> None:
    """Every ratio is 1, in every chunk; so is that to a reference with the old policy's weights."""
    h_TH, weight_VH, target_T, batch = make_case()
    logp_T = dense_logp(h_TH, weight_VH, target_T)[0].detach()
    expected = dense(h_TH, weight_VH, target_T, replace(batch, old_logp_T=logp_T, ref_logp_T=logp_T), OWPO)
    lean = replace(batch, old_logp_T=None, ref_is_old_T=torch.ones_like(batch.mask_T))
    for chunk in (1, 7, None):
        out = Head(weight_VH, chunk_rows=chunk).loss(h_TH.clone().requires_grad_(), target_T, lean, OWPO)
        assert out.metrics["ratio_sum"] == out.metrics["tokens"] == out.metrics["w_sum"]
        assert_same(ours(h_TH, weight_VH, target_T, lean, OWPO, chunk_rows=chunk), expected)


def test_log_probs_that_may_not_stand_in_a_ratio_are_refused() -> None:
    h_TH, weight_VH, target_T, batch = make_case()
    batch = replace(batch, given={"drift": torch.zeros_like(batch.advantage_T)})
    ours(h_TH, weight_VH, target_T, batch, OWPO)
    for field in ("old_mode", "ref_mode", "now_mode"):
        for mode in ("fp8_raw", "fp8_refined"):
            with pytest.raises(TypeError, match=f"log-probs are {mode}, the policy's exact"):
                ours(h_TH, weight_VH, target_T, replace(batch, **{field: mode}), OWPO)


# ------------------------------------------------------------------------------------------- autograd's side
def test_only_wanted_gradients_are_formed_and_only_once() -> None:
    h_TH, weight_VH, target_T, batch = make_case()
    h = h_TH.clone().requires_grad_()
    frozen = Head(weight_VH).loss(h, target_T, batch, OWPO)
    frozen.loss_sum.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="one backward a forward"):
        frozen.loss_sum.backward()
    weight = weight_VH.clone().requires_grad_()
    Head(weight).loss(h_TH, target_T, batch, OWPO).loss_sum.backward()
    expected = dense(h_TH, weight_VH, target_T, batch, OWPO)
    assert_same({"dh": h.grad, "dweight": weight.grad}, {name: expected[name] for name in ("dh", "dweight")})
    with torch.no_grad():
        assert not Head(weight).loss(h, target_T, batch, OWPO).loss_sum.requires_grad


def test_main_grad_is_added_to_in_the_forward() -> None:
    """Two passes over one buffer, as of microbatches; the backward returns a dummy and reports it as added."""
    h_TH, weight_VH, target_T, batch = make_case(dtype=torch.float32)
    expected = dense(h_TH, weight_VH, target_T, batch, OWPO)
    for embedding_too in (False, True):
        weight = weight_VH.clone().requires_grad_()
        weight.main_grad = torch.ones_like(weight)
        weight.grad_added_to_main_grad = False
        weight.zero_out_wgrad = embedding_too
        for done in (1, 2):
            h = h_TH.clone().requires_grad_()
            out = Head(weight, chunk_rows=4).loss(h, target_T, batch, OWPO)
            assert not weight.grad_added_to_main_grad or done == 2
            weight.grad = None
            out.loss_sum.backward()
            assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
            assert not embedding_too or not weight.grad.any()
            found = {"dh": h.grad, "dweight": weight.main_grad - 1}
            assert_same(found, {"dh": expected["dh"], "dweight": done * expected["dweight"]}, 1e-4)


def test_main_grad_below_float32_is_rounded_once() -> None:
    h_TH, weight_VH, target_T, batch = make_case(dtype=torch.float32)
    weight = weight_VH.clone().requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=torch.bfloat16)
    Head(weight, chunk_rows=1).loss(h_TH, target_T, batch, OWPO)
    whole = ours(h_TH, weight_VH, target_T, batch, OWPO, chunk_rows=1)["dweight"]
    assert torch.equal(weight.main_grad, whole.bfloat16())


def test_another_upstream_gradient_than_one_is_refused_with_main_grad() -> None:
    h_TH, weight_VH, target_T, batch = make_case()
    weight = weight_VH.clone().requires_grad_()
    weight.main_grad = torch.zeros_like(weight)
    out = Head(weight).loss(h_TH.clone().requires_grad_(), target_T, batch, OWPO)
    with pytest.raises(RuntimeError, match="formed for an upstream gradient of 1"):
        (2.0 * out.loss_sum).backward()


# ------------------------------------------------------------------------------------------------ two ranks
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one row per chunk": {"chunk_rows": 1},
    "temperature, upstream": {"temperature": 0.6, "upstream": 2.5},
    "padded": {"vocab_size": 33, "entropy_coef": 0.2},
    "a rank of padding only": {"vocab_size": 15, "entropy_coef": 0.2},
    "chunks of the device's own choice": {"rows": 60, "vocab_size": 33},
    "masked": {"mask": True, "chunk_rows": 4},
    "k3": {"method": "sym_dapo", "chunk_rows": 7},
}


def tp_case(case: str):
    options = dict(CASES[case])
    method = make_method(options.pop("method", "owpo"), entropy_coef=options.pop("entropy_coef", 0.0))
    h_TH, weight_VH, target_T = make_inputs(vocab=36, rows=options.pop("rows", 24))
    target_T %= options.get("vocab_size", 36)
    where = {name: options[name] for name in ("temperature", "vocab_size") if name in options}
    batch = make_batch(dense_logp(h_TH, weight_VH, target_T, **where)[0])
    if options.pop("mask", False):
        batch = replace(batch, row_mask_T=batch.mask_T)
    return (h_TH, weight_VH, target_T, batch, method), options


def run_rank(folder: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # 40 rows of 18 columns, 48 of the 15 that are not padding: the ranks must agree on one of them
    backend.TORCH_BYTES = 4 * 18 * 40
    results = {}
    for case in CASES:
        (h_TH, weight_VH, *rest), options = tp_case(case)
        results[case] = ours(h_TH, weight_VH.chunk(2)[rank], *rest, group=dist.group.WORLD, **options)
    torch.save(results, f"{folder}/rank{rank}.pt")


def test_two_ranks_equal_dense(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, run_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for case in CASES:
        inputs, options = tp_case(case)
        row_mask_T = inputs[3].row_mask_T
        options.pop("chunk_rows", None)
        expected = dense(*inputs, **options)
        for name in ("loss", "logp", "entropy"):
            assert torch.equal(first[case][name], second[case][name]), (case, name)
            if row_mask_T is not None and name != "loss":
                expected[name] = expected[name] * row_mask_T
        # the gradient of h is a partial sum on each rank; the weight's shards are complete
        found = first[case] | {
            "dh": first[case]["dh"] + second[case]["dh"],
            "dweight": torch.cat([first[case]["dweight"], second[case]["dweight"]]),
        }
        assert_same(found, expected)
