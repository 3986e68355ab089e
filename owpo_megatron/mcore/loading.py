"""Starting weights: an HF folder, or a megatron checkpoint of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from owpo_megatron.families import HFModel, HFReader, check_weights, to_megatron
from owpo_megatron.mcore import checkpoint
from owpo_megatron.mcore.topology import Topology
from owpo_megatron.mcore.weights import named_shards
from owpo_megatron.run.layout import STATE
from owpo_megatron.run.manifest import require_proof


@torch.no_grad()
def load_model_weights(path: Path, chunks: list[Any], hf: HFModel, topology: Topology) -> None:
    """Fill this rank's shards; every tensor is read lazily, its own slice only. Collective for megatron folders.

    Raises:
        UserError: the weights are not whole or of another model, or a conversion has no proof.
    """
    if (path / STATE).is_dir():
        require_proof(path)
        checkpoint.load_weights(path / STATE, chunks)
        return
    reader = HFReader(path)
    check_weights(hf, reader)
    for name, param in named_shards(chunks):
        param.copy_(to_megatron(hf, name, reader, tp_rank=topology.tp_rank, tp_size=topology.tp_size))
