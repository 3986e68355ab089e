"""Writes the weights of a sharded (torch_dist) checkpoint tensor by tensor, without a model and without its memory.

What megatron-core's own save leaves behind for weights, a test compares: the same keys, shapes and dtypes, so that
`checkpoint.load_weights` and megatron's own loading read it at any tensor, pipeline, expert and data parallel size.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

# Ranks read whole blobs and keep their rows: small ones cost less where many ranks share a tensor.
_BLOB_BYTES = 64 * 2**20


class PartFile:
    """One file of a sharded checkpoint in the making; `entries` says what is in it, in plain JSON types.

    Example:
        with PartFile(folder, 7) as part:
            part.add("model.embedding.word_embeddings.weight", (), (), rows, first_row=0, all_rows=151936)
        finish_state(folder, part.entries)
    """

    def __init__(self, folder: Path, number: int):
        self._name = f"__{number}_0.distcp"  # as torch names them: of rank, file
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
            index: the entry's place in the leading dimensions (layer, expert), whose sizes are `leading`.
            first_row, all_rows: where the rows belong, and how many there are in all; None: these.
            blocks: equal blocks of rows that no blob may cross.
        """
        rows = tensor.shape[0]
        shape = (*leading, all_rows or rows, *tensor.shape[1:])
        for start, stop in _blobs(rows, rows // blocks, max(1, _BLOB_BYTES // (tensor.nbytes // rows))):
            blob = tensor[start:stop]
            begin = self._file.tell()
            # saving a view would save all of its storage
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
    """True when the files of these entries are there and long enough."""
    ends: dict[str, int] = {}
    for entry in entries:
        ends[entry["file"]] = max(ends.get(entry["file"], 0), entry["begin"] + entry["length"])
    return all((folder / file).is_file() and (folder / file).stat().st_size >= end for file, end in ends.items())


def finish_state(folder: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write what makes a checkpoint of the part files: the table of contents, and what megatron keeps beside it."""
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
    """(first row, last row + 1) of pieces of at most `largest` rows that cross no edge of a block."""
    for edge in range(0, rows, block):
        for start in range(edge, edge + block, largest):
            yield start, min(start + largest, edge + block)
