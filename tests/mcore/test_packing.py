"""Packing samples into microbatches: properties of the plan, one pack by hand, the objective's inputs.

That losses and gradients do not depend on the split is tested against the dense oracle (test_parity.py).
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from owpo_megatron.bench.client_objects import pack as one_by_one
from owpo_megatron.mcore.packing import (
    build_microbatch,
    packed_length,
    padded_to_longest,
    plan_microbatches,
    token_batch,
)
from owpo_megatron.methods.loss import chunk_batch
from owpo_megatron.types import Ids, Sample, TokenBatch, TokenIds, TokenValues

CPU = torch.device("cpu")


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=0, max_size=40),
    dp_size=st.integers(1, 5),
    max_tokens=st.integers(1, 80),
    multiple_of=st.integers(1, 4),
    at_least=st.integers(1, 6),
)
def test_plan(lengths: list[int], dp_size: int, max_tokens: int, multiple_of: int, at_least: int) -> None:
    plan = plan_microbatches(lengths, dp_size, max_tokens, multiple_of, at_least)
    assert plan == plan_microbatches(lengths, dp_size, max_tokens, multiple_of, at_least)
    assert len(plan) == dp_size
    every = [index for rank in plan for microbatch in rank for index in microbatch]
    assert sorted(every) == list(range(len(lengths))), "every sample exactly once"
    counts = {len(rank) for rank in plan}
    assert len(counts) == 1, "every rank takes part in equally many passes"
    count = counts.pop()
    assert count >= at_least and count % multiple_of == 0
    for microbatch in (microbatch for rank in plan for microbatch in rank):
        tokens = sum(lengths[index] for index in microbatch)
        assert tokens <= max_tokens or len(microbatch) == 1, "only a long sample alone may exceed the limit"


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), dp_size=st.integers(1, 5))
def test_plan_balances_ranks(lengths: list[int], dp_size: int) -> None:
    """No rank has more than the fewest tokens plus one longest sample (what longest-first promises)."""
    loads = [sum(lengths[i] for pack in rank for i in pack) for rank in plan_microbatches(lengths, dp_size, 64)]
    assert max(loads) - min(loads) <= max(lengths)


def test_plan_by_hand() -> None:
    """Longest first to the emptiest rank: 5 -> 0, 4 -> 1, 3 -> 1, 2 -> 0; first fit into packs of 6."""
    assert plan_microbatches([3, 5, 2, 4], dp_size=2, max_tokens=6) == [[[1], [2]], [[3], [0]]]
    assert plan_microbatches([3, 5, 2, 4], dp_size=1, max_tokens=7) == [[[1, 2], [3, 0]]]


@pytest.mark.parametrize("pad_to", [1, 4])
def test_all_packs_of_a_rank_get_one_length(pad_to: int) -> None:
    """Also on a rank that has no sample: with interleaved stages a pass over few samples leaves ranks idle."""
    samples = [sample((7, 8), (9, 1)), sample((7,), (9, 9, 9, 1))]
    lengths = [packed_length(one) for one in samples]
    for plan in plan_microbatches(lengths, dp_size=3, max_tokens=64, multiple_of=2, at_least=4):
        width = padded_to_longest(lengths, plan, pad_to)
        packs = [build_microbatch(samples, indices, width, CPU) for indices in plan]
        assert {pack.token_T.shape[1] for pack in packs} == {width} and width % pad_to == 0


def sample(prompt: tuple[int, ...], response: Ids, **fields: Any) -> Sample:
    defaults: dict[str, Any] = dict(advantage=1.0, active=True, behaviour_logp=tuple(-float(t) for t in response))
    return Sample(prompt, response, **(defaults | fields))


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=6),
    pad_to=st.integers(1, 8),
    seed=st.integers(0, 2**20),
)
def test_blocks_pack_as_their_numbers_one_by_one(shapes: list[tuple[int, int]], pad_to: int, seed: int) -> None:
    rng = random.Random(seed)
    samples = [
        sample(
            tuple(rng.randrange(99) for _ in range(prompt)),
            TokenIds([rng.randrange(99) for _ in range(length)]),
            behaviour_logp=TokenValues([-rng.random() for _ in range(length)]),
        )
        for prompt, length in shapes
    ]
    pack = build_microbatch(samples, range(len(samples)), pad_to, CPU)
    wanted = one_by_one(samples)
    length = len(wanted[0])
    for found, numbers in zip((pack.token_T, pack.target_T, pack.position_T, pack.mask_T), wanted[:4], strict=True):
        assert torch.equal(found[0, :length], numbers) and found.dtype == numbers.dtype
    assert pack.token_T.shape[1] % pad_to == 0 and not pack.mask_T[0, length:].any()
    behaviour_T = token_batch(samples, pack).behaviour_logp_T
    assert behaviour_T is not None and torch.equal(behaviour_T[:length], wanted[4])


def test_a_long_tail_is_balanced_by_its_flops() -> None:
    """512 lognormal lengths up to 32k on 64 ranks, Qwen3-8B's attention: within 2 % of the mean, or the largest sample
    alone is more than that; tokens alone leave more. Short samples are planned as before."""
    for seed in range(5):
        rng = random.Random(seed)
        lengths = [min(32768, max(1, int(rng.lognormvariate(math.log(3000), 1.2)))) for _ in range(512)]
        work = [length * (1 + 1.8e-5 * length) for length in lengths]
        mean = sum(work) / 64
        plans = [plan_microbatches(lengths, 64, 32768, attention=attention) for attention in (1.8e-5, 0.0)]
        by_flops, by_tokens = (
            max(sum(work[index] for pack in rank for index in pack) for rank in plan) / mean for plan in plans
        )
        assert by_flops <= max(1.02, max(work) / mean) < by_tokens
    short = [rng.randrange(1, 2000) for _ in range(64)]
    assert plan_microbatches(short, 4, 4096, attention=1.8e-5) == plan_microbatches(short, 4, 4096)


SAMPLES = [sample((7, 8), (9, 1)), sample((3,), (4,)), sample((5, 6, 2), (8, 8, 1))]


def test_pack_by_hand() -> None:
    """Two samples of 5 and 3 tokens (the last of each is only a target), the tail to a multiple of 4."""
    assert [packed_length(s) for s in SAMPLES] == [3, 1, 5]
    pack = build_microbatch(SAMPLES, [2, 1], pad_to=4, device=CPU)
    assert pack.sample_indices == (2, 1)
    assert pack.token_T.tolist() == [[5, 6, 2, 8, 8, 3, 0, 0]]
    assert pack.target_T.tolist() == [[6, 2, 8, 8, 1, 4, 0, 0]]
    assert pack.position_T.tolist() == [[0, 1, 2, 3, 4, 0, 0, 1]]
    assert pack.mask_T.tolist() == [[False, False, True, True, True, True, False, False]]
    params = pack.packed_seq_params
    assert params.qkv_format == "thd" and params.cu_seqlens_q.tolist() == [0, 5, 6, 8]
    assert params.cu_seqlens_q.dtype == torch.int32 and params.max_seqlen_q == params.max_seqlen_kv == 5


@pytest.mark.parametrize("pad_to", [1, 2, 8])
def test_empty_pack_is_one_masked_sequence(pad_to: int) -> None:
    pack = build_microbatch(SAMPLES, [], pad_to, CPU)
    assert pack.token_T.shape == (1, pad_to) and not pack.mask_T.any()
    assert pack.packed_seq_params.cu_seqlens_q.tolist() == [0, pad_to]
    batch = token_batch(SAMPLES, pack)
    assert batch.num_samples == 0 and not batch.mask_T.any()


def test_prompt_may_not_be_empty() -> None:
    with pytest.raises(AssertionError, match="first response token"):
        packed_length(sample((), (1, 2)))


def batch_of(samples: list[Sample]) -> TokenBatch:
    return token_batch(samples, build_microbatch(samples, range(len(samples)), 1, CPU))


def test_token_batch_by_hand() -> None:
    """Packed: 3 positions of sample 0 (response at 1, 2), 1 of sample 1, 5 of sample 2 (response at 2, 3, 4)."""
    per_token_L = torch.tensor([0.5, 1, 2])
    given_logps = [
        replace(SAMPLES[0], old_logp=torch.tensor([-1.0, -2.0]), ref_logp=torch.tensor([-1.5, -2.5]), advantage=2.0),
        replace(SAMPLES[1], old_logp=torch.tensor([-3.0]), active=False, masked=True, advantage=-1.0),
        replace(SAMPLES[2], old_logp=torch.tensor([-4.0, -5.0, -6.0]), ref_is_old=True, advantage=per_token_L),
    ]
    batch = batch_of(given_logps)
    assert batch.old_logp_T.tolist() == [0, -1, -2, -3, 0, 0, -4, -5, -6]
    assert batch.ref_logp_T.tolist() == [0, -1.5, -2.5, 0, 0, 0, 0, 0, 0]
    assert batch.ref_is_old_T.tolist() == [False] * 6 + [True] * 3
    assert chunk_batch(batch, slice(None), torch.zeros(9)).ref_logp_C.tolist() == [0, -1.5, -2.5, 0, 0, 0, -4, -5, -6]
    assert batch.advantage_T.tolist() == [0, 2, 2, -1, 0, 0, 0.5, 1, 2], "one number per sample, or one per token"
    assert batch.active_T.tolist() == [False, True, True, False, False, False, True, True, True]
    assert batch.mask_T.tolist() == [False, True, True, False, False, False, True, True, True], "sample 1 is masked"
    assert batch.row_mask_T.tolist() == [False, True, True, True, False, False, True, True, True]
    assert batch.sample_T.tolist() == [0, 0, 0, 1, 0, 0, 2, 2, 2]
    assert batch.num_samples == 3
    assert batch.behaviour_logp_T is not None
    assert batch.behaviour_logp_T.tolist() == [0, -9, -1, -4, 0, 0, -8, -8, -1]
    assert batch.given is None, "nothing was prepared"


def test_old_pass_not_spent_is_the_current_policy() -> None:
    """One update per step: old is the current policy, detached; a reference equal to old is the same numbers."""
    logp_T = torch.randn(9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    batch = batch_of([replace(s, ref_is_old=index != 1) for index, s in enumerate(SAMPLES)])
    chunk = chunk_batch(batch, slice(1, 9), logp_T[1:])
    assert batch.old_logp_T is None
    assert torch.equal(chunk.old_logp_C, logp_T[1:]) and not chunk.old_logp_C.requires_grad
    of_old_C = batch.mask_T[1:] & (batch.sample_T[1:] != 1)
    assert torch.equal(chunk.ref_logp_C[of_old_C], chunk.old_logp_C[of_old_C])
    assert chunk.ref_logp_C[2] == 0, "sample 1 has no reference"


def test_what_a_method_prepared_is_spread_over_tokens() -> None:
    """A number for every token of its sample, or one per token; all samples or none."""
    given = ({"a": 1.5, "b": torch.tensor([1.0, 2])}, {"a": 2.5, "b": 3.0}, {"a": 0.0, "b": torch.tensor([4.0, 5, 6])})
    prepared = [replace(sample, given=one) for sample, one in zip(SAMPLES, given, strict=True)]
    batch = batch_of(prepared)
    assert batch.given["a"].tolist() == [0, 1.5, 1.5, 2.5, 0, 0, 0, 0, 0]
    assert batch.given["b"].tolist() == [0, 1, 2, 3, 0, 0, 4, 5, 6]
    assert batch_of([prepared[0], SAMPLES[1]]).given is None


def test_old_pass_is_of_all_samples_or_none() -> None:
    mixed = [replace(SAMPLES[0], old_logp=torch.zeros(2)), SAMPLES[1]]
    with pytest.raises(AssertionError, match="all samples or none"):
        batch_of(mixed)
