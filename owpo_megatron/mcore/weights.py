"""Load weights into sharded chunks, from an HF folder or a megatron folder, and name what a rank holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel, HFReader, check_weights, to_megatron
from owpo_megatron.mcore import checkpoint
from owpo_megatron.mcore.topology import Topology
from owpo_megatron.run.layout import STATE
from owpo_megatron.run.manifest import require_proof

_ROUTER_BIAS = "expert_bias"  # a constant of the router: a buffer, not a parameter


@torch.no_grad()
def load_model_weights(path: Path, chunks: Sequence[Any], hf: HFModel, topology: Topology, again: bool = False) -> None:
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


def named_shards(chunks: Sequence[Any]) -> Iterator[tuple[str, torch.Tensor]]:
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


def _name_globally(parts: list[str], first_expert: int) -> None:
    """Replace this rank's expert index by the layer's, in local_experts.0... or linear_fc1.weight0."""
    if parts[5] == "local_experts":
        parts[6] = str(int(parts[6]) + first_expert)
    else:
        stem = parts[6].rstrip("0123456789")
        parts[6] = f"{stem}{int(parts[6].removeprefix(stem)) + first_expert}"
