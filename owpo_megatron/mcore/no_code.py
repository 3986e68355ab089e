"""Reading of checkpoints that cannot run code, whoever wrote them.

A pickle may call any function. torch.distributed.checkpoint reads its table of contents (`.metadata`) and objects that
are no tensors with an unrestricted unpickler; megatron-core inherits both. `install` replaces the two readers: the
table may name the dozen classes that a table consists of, objects are read with `weights_only`. torch itself reads the
rest (common.pt, tensors, .bin files) with `weights_only`.
"""

from __future__ import annotations

import io
import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, WriteItemType

from owpo_megatron.errors import UserError

_METADATA, _PLANNER, _FILES = (f"torch.distributed.checkpoint.{name}" for name in ("metadata", "planner", "filesystem"))
_ALLOWED = {
    *(
        (_METADATA, name)
        for name in (
            "Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata",
            "BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING",
        )
    ),
    *((_PLANNER, name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    (_FILES, "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
}  # fmt: skip
_BUILTINS = ("set", "frozenset", "list", "dict", "tuple")
_ENUMS = (_MEM_FORMAT_ENCODING, WriteItemType)


class ForbiddenName(pickle.UnpicklingError):
    """A pickle names something that no checkpoint needs."""


class _Table(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        allowed = (module, name) in _ALLOWED or (module == "builtins" and name in _BUILTINS)
        if allowed or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise ForbiddenName(f"names {f'{module}.{name}'!r}, which no checkpoint needs and which would run as code")


def _member(kind: Any, name: Any) -> Any:
    """Stand for getattr, by which early releases of Python 3.11 pickle an enum's member (Debian 12 has 3.11.2)."""
    if not any(kind is one for one in _ENUMS) or not isinstance(name, str) or name not in kind.__members__:
        raise ForbiddenName(f"reads the attribute {name!r} of {kind!r}, which no checkpoint needs; it could run code")
    return kind.__members__[name]


def read_table(stream: BinaryIO) -> Metadata:
    """The table of contents of a sharded checkpoint.

    Raises:
        ForbiddenName: it names anything else.
        UnpicklingError: it is damaged.
    """
    try:
        table = _Table(stream).load()
        sound = isinstance(table, Metadata) and _is_sound(table)
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # an unpickler of damaged bytes raises anything: KeyError, UnicodeDecodeError, ...
        raise pickle.UnpicklingError(f"{type(error).__name__}: {error}") from error
    if not sound:
        raise pickle.UnpicklingError(f"it contains a {type(table).__name__} that is no table of contents")
    return table


def _is_sound(table: Metadata) -> bool:
    """Whether every part has its type, and no file lies outside the folder."""
    for name, stored in table.state_dict_metadata.items():
        if not isinstance(name, str) or not isinstance(stored, TensorStorageMetadata | BytesStorageMetadata):
            return False
        if isinstance(stored, TensorStorageMetadata):
            boxes = [(chunk.offsets, chunk.sizes) for chunk in stored.chunks]
            rank = len(stored.size)
            if not isinstance(stored.properties.dtype, torch.dtype) or any(
                len(extent) != rank or not all(isinstance(value, int) for value in extent)
                for box in boxes
                for extent in box
            ):
                return False
    return all(
        isinstance(index, MetadataIndex)
        and isinstance(info, _StorageInfo)
        and isinstance(info.relative_path, str)
        and Path(info.relative_path).name == info.relative_path
        and info.relative_path.isprintable()
        and isinstance(info.offset, int)
        and isinstance(info.length, int)
        for index, info in table.storage_data.items()
    )


def table_of(folder: Path) -> Metadata:
    """The table of contents of the checkpoint in this folder.

    Raises:
        UserError: it is damaged, or would run code.
    """
    try:
        with (folder / ".metadata").open("rb") as file:
            return read_table(file)
    except ForbiddenName as error:
        raise UserError("megatron checkpoint", folder / ".metadata", f"{error}; do not use this folder") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            "megatron checkpoint", folder / ".metadata", f"is damaged ({' '.join(str(error).split())})"
        ) from error


@lru_cache(maxsize=1)
def install() -> None:
    """Replace the two readers of torch.distributed.checkpoint in this process."""
    FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign]
    DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign]


def _read_metadata(self: FileSystemReader, *_: Any, **__: Any) -> Metadata:
    table = table_of(Path(self.path))
    table.storage_meta = table.storage_meta or StorageMeta()
    table.storage_meta.load_id = self.load_id
    return table


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    loaded = torch.load(value, weights_only=True)
    name = read_item.dest_index.fqn
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded
