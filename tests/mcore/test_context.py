"""Context parallelism: how packs are split, what the loss sees of a part, attention over parts against whole ones.

Whole updates at cp 2 and 4: test_parity.py, tests/policy/test_method_updates.py. Not covered: Transformer Engine's
attention, which needs GPUs; its limits are refused by name.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from context_worker import GROUPS, HEADS, SIZE, attention_in_parts
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank
from megatron.core.packed_seq_params import PackedSeqParams
from rank_pool import Ranks
from recipe_models import SHAPES
from test_core_attention import core_attention
from tiny import make_config, random_samples

from owpo_megatron.config import ParallelConfig
from owpo_megatron.errors import UserError
from owpo_megatron.families import DeltaNet, HFModel, check_parallel, read_hf_config
from owpo_megatron.mcore.context import Context, check_context_attention, gathered_order, zigzag_rows
from owpo_megatron.mcore.packing import build_microbatch, packed_length, token_batch
from owpo_megatron.methods.loss import Division
from owpo_megatron.types import Sample

CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------ the split
def test_rows_by_hand() -> None:
    """The example in Transformer Engine's attn_forward_func_with_cp: sequences of 8 and 4 tokens on two ranks."""
    assert zigzag_rows([8, 4], 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag_rows([8, 4], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.sampled_from([2, 3, 4]))
def test_parts_make_the_whole(chunks: list[int], size: int) -> None:
    """Every token is on one rank, all ranks have equally many, and the gathered order finds them again."""
    lengths = [2 * size * number for number in chunks]
    parts = [zigzag_rows(lengths, size, rank) for rank in range(size)]
    assert {len(part) for part in parts} == {sum(lengths) // size}
    assert torch.equal(torch.cat(parts)[gathered_order(lengths, size)], torch.arange(sum(lengths)))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_positions_are_those_of_megatron_core(rank: int) -> None:
    """megatron-core's rotary embedding takes the positions of a part from its own arithmetic."""
    samples = [one for one in random_samples(2) if len(one.prompt_ids) > 1][:3]
    context = Context(3, rank)
    pack = build_microbatch(samples, range(3), 12, CPU, context)
    lengths = [packed_length(one, 6) for one in samples]
    padding = 3 * pack.token_T.shape[1] - sum(lengths)
    positions = [
        _get_thd_freqs_on_this_cp_rank(rank, 3, torch.zeros(length // 3), torch.arange(99))
        for length in [*lengths, *([padding] if padding else [])]
    ]
    assert pack.position_T[0].tolist() == torch.cat(positions).tolist()
    assert pack.packed_seq_params.cu_seqlens_q_padded is pack.packed_seq_params.cu_seqlens_q


# ------------------------------------------------------------------------------------------------ the loss's inputs
def long_and_short() -> list[Sample]:
    """Response lengths 5 (two tokens of it shown by an environment) and 2, packed lengths 7 and 2."""
    first = Sample((1, 2, 3), (4, 5, 6, 7, 8), 0.5, True, (-1.0, -2.0, -3.0, -4.0, -5.0))
    return [
        replace(first, loss_mask=(True, False, False, True, True)),
        Sample((9,), (10, 11), -1.0, False, (-6.0, -7.0)),
    ]


def test_a_part_by_hand() -> None:
    """Two ranks: sequences of 7 and 2 tokens, padded to 8 and 4; rank 1 has tokens 2 to 5, and 1 and 2."""
    samples = long_and_short()
    assert [packed_length(one, 4) for one in samples] == [8, 4]
    pack = build_microbatch(samples, [0, 1], 4, CPU, Context(2, 1))
    assert pack.length == 12 and pack.packed_seq_params.cu_seqlens_q.tolist() == [0, 8, 12]
    assert pack.token_T.tolist() == [[3, 4, 5, 6, 10, 0]]
    assert pack.target_T.tolist() == [[4, 5, 6, 7, 11, 0]]
    assert pack.position_T.tolist() == [[2, 3, 4, 5, 1, 2]]
    assert pack.mask_T.tolist() == [[True, False, False, True, True, False]]
    batch = token_batch(samples, pack)
    assert batch.mask_T.tolist() == pack.mask_T[0].tolist()
    assert batch.behaviour_logp_T is not None
    assert batch.behaviour_logp_T.tolist() == [-1.0, 0.0, 0.0, -4.0, -7.0, 0.0]
    assert batch.count_S is not None and batch.count_S.tolist() == [3, 2]
    rows, places = pack.responses([0, 3, 5])
    assert rows.tolist() == [0, 3, 4] and places.tolist() == [0, 1, 4]  # of 3 and 2 response tokens


@pytest.mark.parametrize("divisor", ["tokens", "samples", "sample_sums"])
def test_divisors_of_the_parts_add_up(divisor: Any) -> None:
    """Counts are summed over ranks; a token's length is that of its whole response, on every rank."""
    samples = [*long_and_short(), replace(long_and_short()[1], masked=True)]
    whole = token_batch(samples, build_microbatch(samples, range(3), 8, CPU))
    alone, total = Division.of(divisor, whole), 0
    for rank in range(2):
        pack = build_microbatch(samples, range(3), 8, CPU, Context(2, rank))
        batch = token_batch(samples, pack)
        part = Division.of(divisor, batch)
        total += int(part.count)
        assert (part.length_T is None) == (alone.length_T is None)
        if part.length_T is not None:
            assert part.length_T[batch.mask_T].tolist() == [
                {0: 3, 1: 2}[index] for index in batch.sample_T[batch.mask_T].tolist()
            ]
    assert total == int(alone.count) == {"tokens": 5, "samples": 2, "sample_sums": 2}[divisor]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_pack_without_samples_is_padding_alone(rank: int) -> None:
    pack = build_microbatch([], [], 4, CPU, Context(2, rank))
    batch = token_batch([], pack)
    assert pack.token_T.shape == (1, 2) and not batch.mask_T.any()
    assert int(Division.of("samples", batch).count) == 0


# ------------------------------------------------------------------------------------------------ attention
CASES: list[dict[str, Any]] = [
    {"lengths": [16, 8, 24], "window": None, "sinks": False},
    {"lengths": [8, 40], "window": 3, "sinks": False},
    {"lengths": [24, 8, 8], "window": 11, "sinks": True},
]


def on_one_rank(case: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(len(case["lengths"]))
    total = sum(case["lengths"])
    qkv = [
        torch.randn(total, heads, SIZE, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    module = core_attention(case["window"], case["sinks"])
    edges = torch.tensor([0, *case["lengths"]]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges)
    out = module(*qkv, None, packed_seq_params=packed)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    inputs = [*qkv, *([module.softmax_offset] if module.softmax_offset is not None else [])]
    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    tensors = [tensor.detach() for tensor in qkv]
    return {"qkv": tensors, "weight": weight, "out": out.detach(), "gradients": list(gradients)}


@pytest.mark.ranks
@pytest.mark.parametrize("cp", [2, 4])
def test_attention_over_parts_equals_whole_sequences(ranks: Ranks, tmp_path: Path, cp: int) -> None:
    """float64: results and the gradients of queries, keys, values and sinks, on every rank."""
    torch.save([on_one_rank(case) for case in CASES], tmp_path / "whole.pt")
    for rank, found in enumerate(ranks.run(cp, attention_in_parts, cp, tmp_path / "whole.pt", CASES)):
        for case, differences in zip(CASES, found, strict=True):
            assert max(differences.values()) < 1e-11, (rank, case, differences)
            assert math.isfinite(sum(differences.values())) and ("sinks" in differences) == case["sinks"]


# ------------------------------------------------------------------------------------------------ what is refused
@pytest.fixture
def dense(tmp_path: Path) -> HFModel:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-8b-base"]))
    return read_hf_config(tmp_path)


def test_transformer_engines_limits_are_told(dense: HFModel) -> None:
    check_context_attention(dense, 2, 4, None)
    check_context_attention(dense, 2, 4, "a2a")
    check_context_attention(dense, 1, 1, "all_gather")
    with pytest.raises(UserError, match="megatron.cp_comm_type = all_gather: .*p2p and a2a for packed sequences"):
        check_context_attention(dense, 2, 1, "all_gather")
    with pytest.raises(UserError, match="megatron.cp_comm_type = a2a: .* 2 key-value heads .* parallel.cp = 4"):
        check_context_attention(dense, 4, 4, "a2a")
    windowed = replace(dense, attention=replace(dense.attention, window=64))
    with pytest.raises(UserError, match="megatron.cp_comm_type = p2p: .* layers with a window, which need a2a"):
        check_context_attention(windowed, 2, 1, None)
    check_context_attention(windowed, 2, 1, "a2a")
    with pytest.raises(UserError, match="parallel.cp = 2: .* attention sinks for packed sequences; use 1"):
        check_context_attention(replace(dense, attention=replace(dense.attention, sinks=True)), 2, 1, None)


def test_experts_are_spread_over_data_and_context_ranks() -> None:
    assert make_config(Path("m"), parallel={"dp": 2, "cp": 2, "ep": 4}).parallel.world_size == 4
    with pytest.raises(UserError, match=r"parallel.ep = 4: must divide parallel.dp \* cp = 2"):
        make_config(Path("m"), parallel={"cp": 2, "ep": 4})


def test_a_delta_net_is_refused(dense: HFModel) -> None:
    """Its state runs through a sequence from the first token to the last."""
    mixed = replace(dense, delta=DeltaNet(2, 4, 16, 16, 4, layers=(0,)))
    with pytest.raises(UserError, match="parallel.cp = 2: .*delta nets read a sequence from its first token"):
        check_parallel(mixed, ParallelConfig(cp=2))
