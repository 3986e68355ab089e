"""Attention with context parallelism on this rank's part of packed sequences; run by test_context.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEADS, GROUPS, SIZE = 4, 2, 6


def attention_in_parts(cp: int, file: Path, cases: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Each case's largest differences from `file`'s results and gradients on one rank, over this rank's rows."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams
    from test_core_attention import core_attention

    from owpo_megatron.config import ParallelConfig
    from owpo_megatron.mcore.context import ContextPart
    from owpo_megatron.mcore.topology import init_topology

    topology = init_topology(ParallelConfig(cp=cp), seed=0)
    expected, found = torch.load(file), []
    for case, wanted in zip(cases, expected, strict=True):
        module = core_attention(case["window"], case["sinks"], cp)
        part = ContextPart(topology.context, case["lengths"])
        edges = torch.tensor([0, *case["lengths"]]).cumsum(0).to(torch.int32)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=edges, cu_seqlens_kv=edges)
        qkv = [part.own(tensor).requires_grad_() for tensor in wanted["qkv"]]
        out = module(*qkv, None, packed_seq_params=packed)
        (out * part.own(wanted["weight"])).sum().backward()
        whole = part.whole(out.detach())
        differences = {"out": float((whole - wanted["out"]).abs().max())}
        for name, own, gradient in zip("qkv", qkv, wanted["gradients"], strict=False):
            assert own.grad is not None
            differences[name] = float((own.grad - part.own(gradient)).abs().max())
        if module.softmax_offset is not None:  # a replicated parameter: the ranks' gradients are summed
            total = module.softmax_offset.grad.clone()
            torch.distributed.all_reduce(total)
            differences["sinks"] = float((total - wanted["gradients"][3]).abs().max())
        found.append(differences)
    return found
