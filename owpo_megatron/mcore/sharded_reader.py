"""A sharded (torch_dist) folder as a table of tensors: whether it is whole and fits a model, and single ones read.

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
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

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
        self._reader = FileSystemReader(path)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._chunks: dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]] = {}
        self._tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def written_at(self) -> int:
        """When the table of contents was written, in ns."""
        return (self._path / ".metadata").stat().st_mtime_ns

    def dtype(self, key: str) -> torch.dtype:
        """Of one tensor; a KeyError where there is none of that name."""
        return self._tensors[key].properties.dtype

    def shape(self, key: str, leading: int = 0) -> tuple[int, ...]:
        """Of one tensor, without its first `leading` dimensions."""
        return tuple(self._tensors[key].size)[leading:]

    def tensor(self, key: str, index: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> torch.Tensor:
        """One entry of a tensor, put together from however many shards it was saved in.

        Args:
            index: into the leading dimensions (layer, expert), which the result has not.
            rows: (first, last + 1) of the result's first dimension; None: all.
        """
        stored = self._tensors[key]
        shape = self.shape(key, len(index))
        first, stop = rows or (0, shape[0])
        shape = (stop - first, *shape[1:])
        out = torch.empty(shape, dtype=stored.properties.dtype)
        wanted = ChunkStorageMetadata(
            offsets=torch.Size((*index, first, *(0 for _ in shape[1:]))),
            sizes=torch.Size((*(1 for _ in index), *shape)),
        )
        there = TensorStorageMetadata(stored.properties, stored.size, self._chunks_at(key, index))
        items = create_read_items_for_chunk_list(key, there, [wanted])
        assert sum(item.lengths.numel() for item in items) == out.numel(), f"{key} {index} is stored in part only"
        self._reader.read_data(LoadPlan(items), _Into(out.view(wanted.sizes)))
        return out

    def _chunks_at(self, key: str, index: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """The shards of one entry; a shard holds one layer's (and expert's) part."""
        if (key, index) not in self._chunks:
            for chunk in self._tensors[key].chunks:
                self._chunks.setdefault((key, tuple(chunk.offsets)[: len(index)]), []).append(chunk)
        return self._chunks.get((key, index), [])

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
        self.check_shapes({key: tuple(tensor.global_shape) for key, tensor in wanted.items()}, prefix, vocab_size, tied)

    def check_shapes(self, wanted: dict[str, tuple[int, ...]], prefix: str, vocab_size: int, tied: bool) -> None:
        """The same for given shapes by key; rows of the vocabulary's tensors may be padded otherwise."""
        vocabulary = {f"{prefix}embedding.word_embeddings.weight", f"{prefix}output_layer.weight"}
        problems = []
        for key, shape in wanted.items():
            stored = tuple(self._tensors[key].size) if key in self._tensors else None
            if stored is None:
                problems.append(f"{key} is missing")
                continue
            if key in vocabulary and stored[0] >= vocab_size:
                shape = (stored[0], *shape[1:])
            if stored != shape:
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


class _Into(DefaultLoadPlanner):
    """Reads into one given tensor, whose offsets are those of the read items."""

    def __init__(self, target: torch.Tensor):
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        where = tuple(
            slice(offset, offset + length)
            for offset, length in zip(read_item.dest_offsets, read_item.lengths, strict=True)
        )
        return self._target[where]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """It stands where it belongs."""
