"""Weights in and out of the sharded chunks, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from owpo_megatron.parallel import cpu
from owpo_megatron.parallel.topology import Topology


def named_shards(chunks: list[Any]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name with the global layer index, this rank's parameter) of every chunk, in module order."""
    for chunk in chunks:
        model = chunk
        while hasattr(model, "module"):
            model = model.module
        for name, param in model.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(model.decoder.layers[int(parts[2])].layer_number - 1)
            yield ".".join(parts), param


@torch.no_grad()
def gathered_weights(chunks: list[Any], topology: Topology) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """(megatron name, its shards in TP order) of every parameter, on global rank 0; nothing on other ranks.

    Walks the pipeline stage by stage and holds one parameter at a time. Collective: every rank must exhaust it.
    A weight that several stages hold (tied embeddings) comes once for each.
    """
    mine = [(name, tuple(param.shape), param.dtype) for name, param in named_shards(chunks)]
    params = dict(named_shards(chunks))
    catalogue = topology.all_gather((topology.pp_rank, mine))
    by_stage = {stage: names for stage, names in reversed(catalogue)}
    if topology.dp_rank != 0:
        return
    for stage in range(topology.pp_size):
        for name, shape, dtype in by_stage[stage]:
            shards = None
            if topology.pp_rank == stage:
                shards = _all_gather(params[name].detach(), topology)
            if topology.tp_rank != 0:
                continue
            if stage != 0:
                shards = _hand_to_first_stage(shards, shape, dtype, stage, topology)
            if topology.is_main:
                assert shards is not None
                yield name, shards


def _all_gather(local: torch.Tensor, topology: Topology) -> list[torch.Tensor]:
    if topology.tp_size == 1:
        return [local]
    shards = [torch.empty_like(local) for _ in range(topology.tp_size)]
    dist.all_gather(shards, local.contiguous(), group=topology.tp_group)
    return shards


def _hand_to_first_stage(
    shards: list[torch.Tensor] | None, shape: tuple[int, ...], dtype: torch.dtype, stage: int, topology: Topology
) -> list[torch.Tensor] | None:
    group = topology.pp_group
    if topology.pp_rank == stage:
        assert shards is not None
        for shard in shards:
            dist.send(shard.contiguous(), group=group, group_dst=0)
        return None
    if topology.pp_rank == 0:
        received = [torch.empty(shape, dtype=dtype, device=cpu.device()) for _ in range(topology.tp_size)]
        for shard in received:
            dist.recv(shard, group=group, group_src=stage)
        return received
    return None
