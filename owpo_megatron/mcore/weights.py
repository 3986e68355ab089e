"""Load weights into sharded chunks, from an HF folder or a megatron folder, and name what a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel, HFReader, check_weights, to_megatron
from owpo_megatron.mcore import checkpoint
from owpo_megatron.mcore.names import ROUTER_BIAS, is_expert, named_shards
from owpo_megatron.mcore.topology import Topology
from owpo_megatron.run.layout import STATE
from owpo_megatron.run.manifest import require_proof


@torch.no_grad()
def load_model_weights(path: Path, chunks: Sequence[Any], hf: HFModel, topology: Topology, again: bool = False) -> None:
    """Fill this rank's shards, reading only their slices of each tensor. Collective for megatron folders.

    Args:
        again: the chunks already have weights, of another slot. Slots share the constants of a router, which are not
            parameters, so these must be equal.

    Raises:
        UserError: the weights are incomplete or belong to another model, or a conversion has no proof.
    """
    constants = {name: value.clone() for name, value in named_shards(chunks) if name.endswith(ROUTER_BIAS)}
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
