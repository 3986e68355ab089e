"""Load weights into sharded chunks, and gather them again, one tensor at a time.

Initial weights come from an HF folder or a megatron folder; weights for engines and exports are gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel, HFReader, check_weights, to_megatron
from owpo_megatron.mcore import checkpoint, cpu
from owpo_megatron.mcore.topology import Topology
from owpo_megatron.run.layout import STATE
from owpo_megatron.run.manifest import require_proof

_ROUTER_BIAS = "expert_bias"  # a constant of the router: a buffer, not a parameter


@torch.no_grad()
def load_model_weights(path: Path, chunks: list[Any], hf: HFModel, topology: Topology, again: bool = False) -> None:
    """Fill this rank's shards, reading only their slices of each tensor. Collective for megatron folders.

    Args:
        again: the chunks already have weights, of another slot. Slots share the constants of a router, which are not
            parameters, so these must be equal.

    Raises:
        UserError: the weights are incomplete or belong to another model, or a conversion has no proof.
    """
    constants = {name: value.clone() for name, value in named_shards(chunks) if name.endswith(_ROUTER_BIAS)}
    if (path / STATE).is_dir():
        require_proof(path)
        checkpoint.load_weights(path / STATE, chunks)
    else:
        reader = HFReader(path)
        check_weights(hf, reader)
        for name, param in named_shards(chunks):
            rank, size = (topology.tp_rank, topology.tp_size)
            if is_expert(name):
                rank, size = (topology.etp_rank, topology.etp_size)
            param.copy_(to_megatron(hf, name, reader, tp_rank=rank, tp_size=size))
    for name, value in named_shards(chunks):
        if again and name in constants and not torch.equal(value, constants[name]):
            remedy = f"its {name} differs from the loaded one; policy, reference and teachers share it"
            raise UserError("model.path, reference.path or teachers", path, remedy)


def named_shards(chunks: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name with global indices of layer and expert, this rank's tensor) of every chunk, in module order.

    Parameters come first, then the constants of the routers.
    """
    for chunk in chunks:
        model = chunk
        while hasattr(model, "module"):
            model = model.module
        constants = [(name, value) for name, value in model.named_buffers() if name.endswith(_ROUTER_BIAS)]
        for name, param in [*model.named_parameters(), *constants]:
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                layer = model.decoder.layers[int(parts[2])]
                parts[2] = str(layer.layer_number - 1)
                if parts[3:5] == ["mlp", "experts"]:
                    _name_globally(parts, layer.mlp.local_expert_indices[0])
            yield ".".join(parts), param


def is_expert(name: str) -> bool:
    """Whether only the ranks of one expert-parallel index hold this parameter."""
    return ".mlp.experts." in name


@torch.no_grad()
def gathered_weights(chunks: list[Any], topology: Topology) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yield (megatron name, its shards in TP order) of every parameter on global rank 0; nothing on other ranks.

    Iterates over pipeline stages, and in each over its parameters, an expert's followed by those that the other
    expert-parallel ranks have in its place; holds one parameter at a time. Collective: every rank must exhaust it. A
    weight that several stages hold (tied embeddings) is yielded once for each.
    """
    mine = [(name, tuple(param.shape), param.dtype) for name, param in named_shards(chunks)]
    params = dict(named_shards(chunks))
    everywhere = topology.all_gather((topology.pp_rank, topology.ep_rank, mine))
    # the lowest rank at each place owns it: the first of its tensor-parallel group, and of its experts'
    catalogue = {(stage, ep): (rank, names) for rank, (stage, ep, names) in reversed(list(enumerate(everywhere)))}
    for stage in range(topology.pp_size):
        for number in range(len(catalogue[stage, 0][1])):
            for ep_rank in range(topology.ep_size):
                owner, names = catalogue[stage, ep_rank]
                name, shape, dtype = names[number]
                if ep_rank and not is_expert(name):
                    continue
                shards = None
                if stage == topology.pp_rank and _has_first_copy(name, ep_rank, topology):
                    shards = _all_gather(name, params[name].detach(), topology)
                if owner != 0:
                    like = torch.empty(shape, dtype=dtype, device="meta")
                    shards = _hand_to_main(shards, like, _shard_group(name, topology)[1], owner, topology)
                if topology.is_main:
                    assert shards is not None
                    yield name, shards


def _name_globally(parts: list[str], first_expert: int) -> None:
    """Replace this rank's expert index by the layer's, in local_experts.0... or linear_fc1.weight0."""
    if parts[5] == "local_experts":
        parts[6] = str(int(parts[6]) + first_expert)
    else:
        stem = parts[6].rstrip("0123456789")
        parts[6] = f"{stem}{int(parts[6].removeprefix(stem)) + first_expert}"


def _has_first_copy(name: str, ep_rank: int, topology: Topology) -> bool:
    """Whether this rank's part of a parameter, of experts `ep_rank`, is the one that is gathered."""
    if is_expert(name):
        return (topology.ep_rank, topology.expert_copy_rank) == (ep_rank, 0)
    return topology.copy_rank == 0


def _shard_group(name: str, topology: Topology) -> tuple[dist.ProcessGroup, int]:
    """The ranks among which a parameter is split, and how many they are."""
    if is_expert(name):
        return topology.etp_group, topology.etp_size
    return topology.tp_group, topology.tp_size


def _all_gather(name: str, local: torch.Tensor, topology: Topology) -> list[torch.Tensor]:
    group, size = _shard_group(name, topology)
    if size == 1:
        return [local]
    shards = [torch.empty_like(local) for _ in range(size)]
    dist.all_gather(shards, local.contiguous(), group=group)
    return shards


def _hand_to_main(
    shards: list[torch.Tensor] | None, like: torch.Tensor, count: int, owner: int, topology: Topology
) -> list[torch.Tensor] | None:
    """Send what global rank `owner` gathered, `count` tensors like this one, to global rank 0."""
    if topology.rank == owner:
        assert shards is not None
        for shard in shards:
            dist.send(shard.contiguous(), dst=0)
        return None
    if topology.is_main:
        received = [torch.empty_like(like, device=cpu.device()) for _ in range(count)]
        for shard in received:
            dist.recv(shard, src=owner)
        return received
    return None
