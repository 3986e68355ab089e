"""Weights in and out of the sharded chunks, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.topology import Topology


def named_shards(chunks: list[Any]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name with global indices of layer and expert, this rank's parameter) of every chunk, in module order."""
    for chunk in chunks:
        model = chunk
        while hasattr(model, "module"):
            model = model.module
        for name, param in model.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                layer = model.decoder.layers[int(parts[2])]
                parts[2] = str(layer.layer_number - 1)
                if parts[3:5] == ["mlp", "experts"]:
                    _name_globally(parts, layer.mlp.local_expert_indices[0])
            yield ".".join(parts), param


def is_expert(name: str) -> bool:
    """True of a parameter that only the ranks of one expert-parallel index hold."""
    return ".mlp.experts." in name


@torch.no_grad()
def gathered_weights(chunks: list[Any], topology: Topology) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """(megatron name, its shards in TP order) of every parameter, on global rank 0; nothing on other ranks.

    Walks the pipeline stage by stage, and in each stage its own parameters before the other expert-parallel ranks'
    experts; holds one parameter at a time. Collective: every rank must exhaust it. A weight that several stages hold
    (tied embeddings) comes once for each.
    """
    mine = [(name, tuple(param.shape), param.dtype) for name, param in named_shards(chunks)]
    params = dict(named_shards(chunks))
    place = (topology.pp_rank, topology.dp_rank)
    everywhere = enumerate(topology.all_gather((place, mine)))
    catalogue = {at: (rank, names) for rank, (at, names) in reversed(list(everywhere))}  # the lowest rank of a place
    for stage in range(topology.pp_size):
        for ep_rank in range(topology.ep_size):
            owner, names = catalogue[stage, ep_rank]  # its tensor-parallel rank 0; dp rank i < ep_size has ep rank i
            for name, shape, dtype in names:
                if ep_rank and not is_expert(name):
                    continue
                shards = None
                if place == (stage, ep_rank):
                    shards = _all_gather(params[name].detach(), topology)
                if owner != 0:
                    shards = _hand_to_main(shards, shape, dtype, owner, topology)
                if topology.is_main:
                    assert shards is not None
                    yield name, shards


def _name_globally(parts: list[str], first_expert: int) -> None:
    """mlp.experts.local_experts.0... or mlp.experts.linear_fc1.weight0: this rank's index -> the layer's."""
    if parts[5] == "local_experts":
        parts[6] = str(int(parts[6]) + first_expert)
    else:
        stem = parts[6].rstrip("0123456789")
        parts[6] = f"{stem}{int(parts[6].removeprefix(stem)) + first_expert}"


def _all_gather(local: torch.Tensor, topology: Topology) -> list[torch.Tensor]:
    if topology.tp_size == 1:
        return [local]
    shards = [torch.empty_like(local) for _ in range(topology.tp_size)]
    dist.all_gather(shards, local.contiguous(), group=topology.tp_group)
    return shards


def _hand_to_main(
    shards: list[torch.Tensor] | None, shape: tuple[int, ...], dtype: torch.dtype, owner: int, topology: Topology
) -> list[torch.Tensor] | None:
    """Global rank `owner` sends what it gathered to global rank 0."""
    if topology.rank == owner:
        assert shards is not None
        for shard in shards:
            dist.send(shard.contiguous(), dst=0)
        return None
    if topology.is_main:
        received = [torch.empty(shape, dtype=dtype, device=cpu.device()) for _ in range(topology.tp_size)]
        for shard in received:
            dist.recv(shard, src=owner)
        return received
    return None
