"""Read and write a sharded (torch_dist) checkpoint one tensor at a time, without the memory of a model.

Reading checks that a folder is complete and fits a model. megatron-core checks neither before it loads: a missing or
truncated file ends in one of five exceptions, weights that the model does not have are ignored, and a checkpoint with
another vocabulary is read partially.

Writing produces the same keys, shapes and dtypes as megatron-core's own save of weights (a test compares them), so that
`checkpoint.load_weights` and megatron's own loading read it at any tensor, pipeline, expert and data parallel size.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from owpo_megatron.errors import UserError
from owpo_megatron.mcore import no_code

no_code.install()

_FILES = (".metadata", "metadata.json", "common.pt")
_SHOWN = 4  # differences in an error

# Ranks read whole blobs and keep their rows: small ones cost less where many ranks share a tensor.
_BLOB_BYTES = 64 * 2**20


class PartFile:
    """Writer of one file of a sharded checkpoint; `entries` lists its content, in plain JSON types.

    Example:
        with PartFile(folder, 7) as part:
            part.add("model.embedding.word_embeddings.weight", (), (), rows, first_row=0, all_rows=151936)
        finish_state(folder, part.entries)
    """

    def __init__(self, folder: Path, number: int):
        self._name = f"__{number}_0.distcp"  # torch's name: rank, file
        self._path = folder / self._name
        self.entries: list[dict[str, Any]] = []

    def __enter__(self) -> PartFile:
        self._file = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(
        self,
        key: str,
        index: tuple[int, ...],
        leading: tuple[int, ...],
        tensor: torch.Tensor,
        first_row: int = 0,
        all_rows: int | None = None,
        blocks: int = 1,
    ) -> None:
        """Write one entry of the tensor `key`, or some of its rows.

        Args:
            index: the entry's index in the leading dimensions (layer, expert), whose sizes are `leading`.
            first_row, all_rows: position of the rows and their total number; None: these are all.
            blocks: number of equal blocks of rows whose boundaries no blob may cross.
        """
        rows = tensor.shape[0]
        shape = (*leading, all_rows or rows, *tensor.shape[1:])
        for start, stop in _blobs(rows, rows // blocks, max(1, _BLOB_BYTES // (tensor.nbytes // rows))):
            blob = tensor[start:stop]
            begin = self._file.tell()
            # saving a view would save its whole storage
            torch.save(blob.clone().view(*(1 for _ in index), *blob.shape), self._file)
            self.entries.append(
                {
                    "key": key,
                    "shape": shape,
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "offsets": (*index, first_row + start, *(0 for _ in tensor.shape[1:])),
                    "sizes": (*(1 for _ in index), *blob.shape),
                    "file": self._name,
                    "begin": begin,
                    "length": self._file.tell() - begin,
                }
            )


def part_is_whole(folder: Path, entries: Iterable[dict[str, Any]]) -> bool:
    """Whether the files of these entries exist and are long enough."""
    ends: dict[str, int] = {}
    for entry in entries:
        ends[entry["file"]] = max(ends.get(entry["file"], 0), entry["begin"] + entry["length"])
    return all((folder / file).is_file() and (folder / file).stat().st_size >= end for file, end in ends.items())


def finish_state(folder: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Turn part files into a checkpoint: write the table of contents and megatron's metadata."""
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for entry in entries:
        key, offsets = entry["key"], torch.Size(entry["offsets"])
        properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
        stored = tensors.setdefault(key, TensorStorageMetadata(properties, torch.Size(entry["shape"]), []))
        where = MetadataIndex(key, offsets, len(stored.chunks))
        stored.chunks.append(ChunkStorageMetadata(offsets, torch.Size(entry["sizes"])))
        storage[where] = _StorageInfo(entry["file"], entry["begin"], entry["length"])
    metadata = Metadata(tensors, storage_data=storage, storage_meta=StorageMeta())
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    torch.save({"content_metadata": {}}, folder / "common.pt")
    save_config(CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1), str(folder))


def _blobs(rows: int, block: int, largest: int) -> Iterator[tuple[int, int]]:
    """Yield (first row, last row + 1) of pieces of at most `largest` rows that cross no block boundary."""
    for edge in range(0, rows, block):
        for start in range(edge, edge + block, largest):
            yield start, min(start + largest, edge + block)


class StoredState:
    """Reader of a folder written by `checkpoint.save_weights` or `save_training_state`.

    Args:
        path: the folder (`state/` of a megatron folder or of a checkpoint).

    Raises:
        UserError: a file is missing or shorter than in the table of contents.
    """

    def __init__(self, path: Path):
        self._path = path
        for name in _FILES:
            if not (path / name).is_file():
                raise UserError(
                    "megatron checkpoint", path, f"has no {name}: writing was interrupted, or a file was lost"
                )
        metadata = no_code.table_of(path)
        for stored in metadata.storage_data.values():
            file = path / stored.relative_path
            if not file.is_file() or file.stat().st_size < stored.offset + stored.length:
                raise UserError("megatron checkpoint", file, "is missing or truncated; create the folder again")
        self._reader = FileSystemReader(path)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._chunks: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}
        self._tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }

    def written_at(self) -> int:
        """Time of writing the table of contents, in ns."""
        return (self._path / ".metadata").stat().st_mtime_ns

    def keys(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self._tensors.keys()

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of one tensor. Raises KeyError if there is none of that name."""
        return self._tensors[key].properties.dtype

    def shape(self, key: str, leading: int = 0) -> tuple[int, ...]:
        """Return the shape of one tensor, without its first `leading` dimensions."""
        return tuple(self._tensors[key].size)[leading:]

    def tensor(self, key: str, index: tuple[int, ...] = (), rows: tuple[int, int] | None = None) -> torch.Tensor:
        """Read one entry of a tensor, assembled from all shards that it was saved in.

        Args:
            index: index into the leading dimensions (layer, expert), which the result does not have.
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
        """Return the shards of one entry; a shard belongs to one layer (and expert)."""
        table = self._chunks.get((key, len(index)))
        if table is None:  # stored when it is complete: a conversion's threads share it
            table = {}
            for chunk in self._tensors[key].chunks:
                table.setdefault(tuple(chunk.offsets)[: len(index)], []).append(chunk)
            self._chunks[key, len(index)] = table
        return table.get(index, [])

    def check_shapes(self, wanted: dict[str, tuple[int, ...]], prefix: str, vocab_size: int, tied: bool) -> None:
        """Compare with a model's shapes by key; the vocabulary's tensors may have another number of padding rows.

        Args:
            prefix: prefix of the model's keys, e.g. "model.".
            vocab_size: vocabulary size without padding; stored rows beyond it are padding.
            tied: whether the output layer is the embedding.

        Raises:
            UserError: they differ; the message lists the first differences.
        """
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
            problems.append("it has a separate output layer, but the config ties it to the embedding")
        if problems:
            more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            first = "; ".join(problems[:_SHOWN])
            raise UserError(
                "megatron checkpoint", self._path, f"contains another model than the config describes: {first}{more}"
            )


def global_shapes(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Whole shapes by key of this rank's sharded state dict of a model."""
    apply_factories(state)
    tensors = (tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor))
    return {tensor.key: tuple(tensor.global_shape) for tensor in tensors}


class _Into(DefaultLoadPlanner):
    """Load planner that reads into one given tensor, at the offsets of the read items."""

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
        """No-op: the data was read into place."""
