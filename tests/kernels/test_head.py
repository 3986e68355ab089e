"""The LM head against a dense float64 oracle made of log_softmax and autograd, on one rank and on two.

Not covered here: CUDA, and the reduction of the partial gradient of h by megatron's regions (its sum is checked).
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from owpo_megatron.kernels import vocab_parallel_logprob

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def make_inputs(rows=23, hidden=8, vocab=37, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h_TH = torch.randn(rows, hidden, generator=generator, dtype=torch.float64).to(dtype)
    weight_VH = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype)
    target_T = torch.randint(0, vocab, (rows,), generator=generator)
    upstream_2T = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    return h_TH, weight_VH, target_T, upstream_2T


def dense(h_TH, weight_VH, target_T, upstream_2T, temperature=1.0, vocab_size=None, mask_T=None, uses=(True, True)):
    """(logp, entropy, dh, dweight) of the whole vocabulary, everything materialised."""
    h_TH, weight_VH = h_TH.double().requires_grad_(), weight_VH.double().requires_grad_()
    log_softmax = torch.log_softmax(h_TH @ weight_VH[:vocab_size].t() / temperature, dim=1)
    logp_T = log_softmax.gather(1, target_T[:, None])[:, 0]
    entropy_T = -(log_softmax.exp() * log_softmax).sum(1)
    if mask_T is not None:
        logp_T, entropy_T = logp_T * mask_T, entropy_T * mask_T
    loss = sum((up * out).sum() for up, out, used in zip(upstream_2T, (logp_T, entropy_T), uses, strict=True) if used)
    return (logp_T.detach(), entropy_T.detach(), *torch.autograd.grad(loss, (h_TH, weight_VH)))


def ours(h_TH, weight_VH, target_T, upstream_2T, uses=(True, True), **options):
    h_TH, weight_VH = h_TH.clone().requires_grad_(), weight_VH.clone().requires_grad_()
    outs = vocab_parallel_logprob(h_TH, weight_VH, target_T, **options)
    loss = sum((up * out).sum() for up, out, used in zip(upstream_2T, outs, uses, strict=True) if used)
    return (outs[0].detach(), outs[1].detach(), *torch.autograd.grad(loss, (h_TH, weight_VH)))


def assert_all_close(actual, expected, **tolerance):
    for name, ours_, theirs in zip(("logp", "entropy", "dh", "dweight"), actual, expected, strict=True):
        torch.testing.assert_close(
            ours_.double(), theirs, **(tolerance or TOLERANCE), msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("uses", [(True, True), (True, False), (False, True)])
def test_float64_equals_dense(chunk_rows, temperature, uses):
    inputs = make_inputs()
    actual = ours(*inputs, chunk_rows=chunk_rows, temperature=temperature, uses=uses)
    assert_all_close(actual, dense(*inputs, temperature=temperature, uses=uses))


def test_worked_by_hand():
    # logits (0, log 3), p = (1/4, 3/4): logp of column 0 is -log 4; entropy = log 4 - (3/4) log 3
    h = torch.tensor([[1.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([[0.0], [3.0]], dtype=torch.float64).log().clamp(min=0).requires_grad_()
    logp, entropy = vocab_parallel_logprob(h, weight, torch.tensor([0]))
    log3, log4 = torch.tensor([3.0, 4.0], dtype=torch.float64).log().tolist()
    assert logp.item() == pytest.approx(-log4, abs=1e-15)
    assert entropy.item() == pytest.approx(log4 - 0.75 * log3, abs=1e-15)
    logp.backward()
    # d logp / dz = (1 - 1/4, -3/4); dh = sum_j dz_j W_j = -3/4 log 3
    assert weight.grad[:, 0].tolist() == pytest.approx([0.75, -0.75], abs=1e-15)
    assert h.grad.item() == pytest.approx(-0.75 * log3, abs=1e-15)


@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
def test_rows_out_of_the_mask_are_skipped(chunk_rows):
    h_TH, weight_VH, target_T, upstream_2T = make_inputs()
    mask_T = torch.arange(23) % 3 != 0
    expected = dense(h_TH, weight_VH, target_T, upstream_2T, mask_T=mask_T)
    unread = torch.where(mask_T, target_T, torch.full_like(target_T, 10**9))
    actual = ours(h_TH, weight_VH, unread, upstream_2T, row_mask_T=mask_T, chunk_rows=chunk_rows)
    assert_all_close(actual, expected)
    for value in actual[:3]:
        assert not value[~mask_T].any()


def test_nothing_in_the_mask():
    h_TH, weight_VH, target_T, upstream_2T = make_inputs()
    actual = ours(h_TH, weight_VH, target_T, upstream_2T, row_mask_T=torch.zeros(23, dtype=torch.bool))
    assert [value.shape for value in actual] == [(23,), (23,), (23, 8), (37, 8)]
    assert not any(value.any() for value in actual)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_with_zero_upstream_are_skipped_in_the_backward(masked):
    h_TH, weight_VH, target_T, upstream_2T = make_inputs()
    upstream_2T[:, ::2] = 0
    upstream_2T[1, 2] = 1.0  # the entropy alone keeps this row
    mask_T = torch.arange(23) % 5 != 0 if masked else None
    expected = dense(h_TH, weight_VH, target_T, upstream_2T, mask_T=mask_T)
    for skip in (True, False):
        actual = ours(h_TH, weight_VH, target_T, upstream_2T, row_mask_T=mask_T, skip_zero_rows=skip, chunk_rows=4)
        assert_all_close(actual, expected)
    everything_zero = ours(h_TH, weight_VH, target_T, torch.zeros_like(upstream_2T), row_mask_T=mask_T)
    assert not everything_zero[2].any() and not everything_zero[3].any()


def test_padded_vocabulary_takes_no_part():
    h_TH, weight_VH, target_T, upstream_2T = make_inputs(vocab=40)
    weight_VH[37:] = 100.0  # would win every softmax
    target_T %= 37
    actual = ours(h_TH, weight_VH, target_T, upstream_2T, vocab_size=37, chunk_rows=5)
    assert_all_close(actual, dense(h_TH, weight_VH, target_T, upstream_2T, vocab_size=37))
    assert not actual[3][37:].any()
    with pytest.raises(AssertionError, match="1 ranks of 40 rows cannot hold a vocabulary of 41"):
        vocab_parallel_logprob(h_TH, weight_VH, target_T, vocab_size=41)


def test_large_logits_neither_overflow_nor_lose_digits():
    """A certain token's log-prob is about -1e-8: logits near 1000 must not round it away in float64."""
    h = torch.tensor([[1000.0]], dtype=torch.float64)
    weight = torch.tensor([[1.0], [1.0 - 0.0184]], dtype=torch.float64)
    logp, entropy = vocab_parallel_logprob(h, weight, torch.tensor([0]))
    expected = -torch.log1p(torch.exp(torch.tensor(-18.4, dtype=torch.float64)))
    assert logp.item() == pytest.approx(expected.item(), rel=1e-6)
    assert entropy.item() == pytest.approx((19.4 * torch.exp(torch.tensor(-18.4))).item(), rel=1e-4)


@pytest.mark.parametrize(("dtype", "gradient_error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_inputs_are_computed_in_float32(dtype, gradient_error):
    """bfloat16: the log-prob error stays at float32's size, and gradients only round at the end."""
    inputs = make_inputs(rows=40, hidden=32, vocab=300, dtype=dtype)
    logp, entropy, dh, dweight = ours(*inputs, chunk_rows=16)
    expected = dense(*inputs)
    assert logp.dtype == entropy.dtype == torch.float32
    assert dh.dtype == dweight.dtype == dtype
    torch.testing.assert_close(logp.double(), expected[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=2e-5)
    for actual, exact in ((dh, expected[2]), (dweight, expected[3])):
        assert ((actual.double() - exact).norm() / exact.norm()).item() < gradient_error


def test_no_grad_gives_the_same_bits_and_only_wanted_gradients_are_formed():
    h_TH, weight_VH, target_T, _ = make_inputs(dtype=torch.float32)
    with_grad = vocab_parallel_logprob(h_TH.clone().requires_grad_(), weight_VH, target_T, chunk_rows=4)
    with torch.no_grad():
        without = vocab_parallel_logprob(h_TH.clone().requires_grad_(), weight_VH, target_T, chunk_rows=4)
    assert not without[0].requires_grad
    assert torch.equal(with_grad[0], without[0]) and torch.equal(with_grad[1], without[1])
    with_grad[0].sum().backward()
    frozen_h = vocab_parallel_logprob(h_TH, weight_VH.clone().requires_grad_(), target_T)
    frozen_h[0].sum().backward()  # raises if a gradient of h were formed and returned


def test_the_forward_keeps_no_logits():
    """Saved for the backward: inputs and a few numbers a row, nothing of [rows, vocabulary]."""
    h_TH, weight_VH, target_T, _ = make_inputs(rows=50, hidden=4, vocab=1000)
    logp_T, _ = vocab_parallel_logprob(h_TH.requires_grad_(), weight_VH, target_T, chunk_rows=10)
    saved = [tensor for tensor in logp_T.grad_fn.saved_tensors if tensor is not None]
    assert len(saved) >= 4
    own = [t for t in saved if t.data_ptr() not in (h_TH.data_ptr(), weight_VH.data_ptr())]
    assert sum(tensor.numel() for tensor in own) <= 4 * 50


# --------------------------------------------------------------------------------------------- two ranks
CASES = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "padded": {"vocab_size": 33},
    "a rank of padding only": {"vocab_size": 15},
    "masked": {"mask": True, "chunk_rows": 4},
    "nothing masked in": {"mask": False},
}


def tp_case(case):
    options = dict(CASES[case])
    h_TH, weight_VH, target_T, upstream_2T = make_inputs(vocab=36)
    target_T %= options.get("vocab_size", 36)
    if "mask" in options:
        options["row_mask_T"] = (torch.arange(23) % 4 != 1) & options.pop("mask")
    return (h_TH, weight_VH, target_T, upstream_2T), options


def run_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for case in CASES:
        (h_TH, weight_VH, target_T, upstream_2T), options = tp_case(case)
        shard = weight_VH.chunk(2)[rank]
        results[case] = ours(h_TH, shard, target_T, upstream_2T, group=dist.group.WORLD, **options)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.ranks
def test_two_ranks_equal_dense(tmp_path):
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for case in CASES:
        inputs, options = tp_case(case)
        expected = dense(
            *inputs,
            temperature=options.get("temperature", 1.0),
            vocab_size=options.get("vocab_size"),
            mask_T=options.get("row_mask_T"),
        )
        assert torch.equal(first[case][0], second[case][0]), case
        assert torch.equal(first[case][1], second[case][1]), case
        # the gradient of h is a partial sum on each rank; the weight's shards are complete
        summed = first[case][2] + second[case][2]
        assert_all_close((*first[case][:2], summed, torch.cat([first[case][3], second[case][3]])), expected)
