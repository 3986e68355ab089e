"""The table of contents of a sharded (torch_dist) folder: whether it is whole, its dtype, and whether it fits a model.

megatron-core checks none of it before it loads: a missing or cut file ends in one of five exceptions, a checkpoint with
weights that the model has not is read without them, and one of another vocabulary is read in part.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from owpo_megatron.errors import UserError

_FILES = (".metadata", "metadata.json", "common.pt")
_SHOWN = 4  # differences in an error


class StoredState:
    """What a folder written by `checkpoint.save_weights` or `save_training_state` holds.

    Args:
        path: the folder (`state/` of a megatron folder or of a checkpoint).

    Raises:
        UserError: a file is missing or shorter than its table of contents says.
    """

    def __init__(self, path: Path):
        self._path = path
        for name in _FILES:
            if not (path / name).is_file():
                raise UserError("megatron checkpoint", path, f"has no {name}: it was never finished, or lost a file")
        try:
            metadata = FileSystemReader(path).read_metadata()
        except (pickle.UnpicklingError, EOFError) as error:
            raise UserError("megatron checkpoint", path / ".metadata", f"is damaged ({error})") from error
        for stored in metadata.storage_data.values():
            file = path / stored.relative_path
            if not file.is_file() or file.stat().st_size < stored.offset + stored.length:
                raise UserError("megatron checkpoint", file, "is missing or cut short; make the folder again")
        self._tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def dtype(self, key: str) -> torch.dtype:
        """Of one tensor; a KeyError where there is none of that name."""
        return self._tensors[key].properties.dtype

    def check_fits(self, state: dict[str, Any], prefix: str, vocab_size: int, tied: bool) -> None:
        """Compare with this rank's sharded state dict of a model.

        Args:
            prefix: of the model's keys, e.g. "model.".
            vocab_size: the true one; stored rows beyond it are padding.
            tied: the output layer is the embedding.

        Raises:
            UserError: with the first differences.
        """
        apply_factories(state)
        wanted = {tensor.key: tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)}
        problems = []
        for key, tensor in wanted.items():
            stored = tuple(self._tensors[key].size) if key in self._tensors else None
            shape = tuple(tensor.global_shape)
            if stored is None:
                problems.append(f"{key} is missing")
            elif tensor.allow_shape_mismatch and stored[0] >= vocab_size:
                shape = (stored[0], *shape[1:])
            if stored is not None and stored != shape:
                problems.append(f"{key} is {list(stored)} instead of {list(shape)}")
        layers = f"{prefix}decoder.layers."
        if any(key.startswith(layers) for key in wanted):
            problems += [
                f"{key} is unexpected" for key in self._tensors if key.startswith(layers) and key not in wanted
            ]
        if tied and f"{prefix}output_layer.weight" in self._tensors:
            problems.append("it has an output layer of its own, and the config ties it to the embedding")
        if problems:
            more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            told = "; ".join(problems[:_SHOWN])
            raise UserError(
                "megatron checkpoint", self._path, f"holds another model than the config says: {told}{more}"
            )
