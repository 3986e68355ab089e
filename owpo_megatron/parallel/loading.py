"""Starting weights: an HF folder, or a megatron checkpoint of this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from owpo_megatron.convert import HFModel, HFReader, check_weights, to_megatron
from owpo_megatron.errors import UserError
from owpo_megatron.parallel import checkpoint
from owpo_megatron.parallel.topology import Topology
from owpo_megatron.parallel.weights import named_shards

# A megatron folder made by tools/convert_hf_to_megatron.py: sharded weights, and the HF folder's small files.
MEGATRON_STATE, HF_FILES = "state", "hf"


def hf_folder(path: Path) -> Path:
    """The folder with config.json and tokenizer that belongs to a model path.

    Raises:
        UserError: `path` is neither an HF folder nor a megatron folder.
    """
    if (path / "config.json").is_file():
        return path
    if (path / HF_FILES / "config.json").is_file():
        return path / HF_FILES
    if not path.is_dir():
        raise UserError("model.path", path, "no such folder; give an HF folder or a converted megatron folder")
    raise UserError("model.path", path, f"has neither config.json (HF) nor {HF_FILES}/config.json (megatron)")


@torch.no_grad()
def load_model_weights(path: Path, chunks: list[Any], hf: HFModel, topology: Topology) -> None:
    """Fill this rank's shards; every tensor is read lazily, its own slice only. Collective for megatron folders."""
    if (path / MEGATRON_STATE).is_dir():
        checkpoint.load_weights(path / MEGATRON_STATE, chunks)
        return
    reader = HFReader(path)
    check_weights(hf, reader)
    for name, param in named_shards(chunks):
        param.copy_(to_megatron(hf, name, reader, tp_rank=topology.tp_rank, tp_size=topology.tp_size))
