"""Our core attention against a dense one in float64: windows, sinks, grouped queries, both ways of packing.

Not covered: Transformer Engine's attention, several ranks (test_family_training.py).
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from owpo_megatron.mcore.attention import PackedCoreAttention

HEADS, GROUPS, SIZE = 4, 2, 6


def core_attention(window: int | None, sinks: bool, cp: int = 1) -> PackedCoreAttention:
    config = SimpleNamespace(
        context_parallel_size=cp,
        tensor_model_parallel_size=1,
        num_attention_heads=HEADS,
        params_dtype=torch.float64,
        window_size=(window - 1, 0) if window else None,
        window_attn_skip_freq=[0, 1],
        softmax_type="learnable" if sinks else "vanilla",
    )
    module = PackedCoreAttention(config, 2, AttnMaskType.padding_causal, "self")  # type: ignore[arg-type]
    if sinks:
        torch.nn.init.normal_(module.softmax_offset, generator=torch.Generator().manual_seed(9))
    return module


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """One sequence [L, heads, size], token by token and head by head."""
    rows = []
    for token in range(len(query)):
        first = max(0, token - window + 1) if window else 0
        for head in range(HEADS):
            keys, values = (t[first : token + 1, head // (HEADS // GROUPS)] for t in (key, value))
            weights = (keys @ query[token, head] / math.sqrt(SIZE)).exp()
            extra = sinks[head].exp() if sinks is not None else 0.0
            rows.append((weights[:, None] * values).sum(0) / (weights.sum() + extra))
    return torch.stack(rows).view(len(query), -1)


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("lengths", [(5, 7, 6), (20, 1, 1, 1, 1, 1)], ids=["padded", "one by one"])
def test_against_dense_attention(lengths: tuple[int, ...], window: int | None, sinks: bool) -> None:
    """Results, and gradients of queries, keys, values and sinks."""
    module = core_attention(window, sinks)
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = [(sum(lengths), heads, SIZE) for heads in (HEADS, GROUPS, GROUPS)]
    qkv = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    edges = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges)
    ours = module(*qkv, None, packed_seq_params=packed)
    offsets = module.softmax_offset
    theirs = torch.cat([dense(*parts, window, offsets) for parts in zip(*(t.split(lengths) for t in qkv), strict=True)])
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    weight = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    inputs = [*qkv, *([offsets] if offsets is not None else [])]
    for mine, dense_one in zip(
        torch.autograd.grad((ours * weight).sum(), inputs),
        torch.autograd.grad((theirs * weight).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(mine, dense_one, rtol=0, atol=1e-11)


def test_only_windowed_layers_have_the_window() -> None:
    assert core_attention(3, sinks=False).window == 3
    config = SimpleNamespace(
        context_parallel_size=1, window_size=(2, 0), window_attn_skip_freq=[0, 1], softmax_type="vanilla"
    )
    assert PackedCoreAttention(config, 1, AttnMaskType.causal, "self").window is None  # type: ignore[arg-type]
