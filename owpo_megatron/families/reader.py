"""Reads tensors, or slices of them, from an HF folder's safetensors files without loading the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from owpo_megatron.errors import UserError

_MAX_MAPPED = 256 * 2**20


class HFReader:
    """The tensors of an HF folder: one `model.safetensors`, or shards with or without an index file.

    Files are memory-mapped and opened when first needed. What was read stays mapped, and counts as this process's
    memory, until the files are closed: they are after every 256 MB, and opened again when needed.

    Raises:
        UserError: the folder has no safetensors files, or a file that the index names is missing or broken.

    Example:
        HFReader(path).slice("model.embed_tokens.weight", 0, 0, 1000)  # the first 1000 rows
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._files: dict[Path, Any] = {}
        self._mapped = 0  # bytes read since the files were opened
        self._file_of = self._locate()

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._view(name).get_shape())

    def dtype(self, name: str) -> str:
        """As the file names it, e.g. BF16."""
        return str(self._view(name).get_dtype())

    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted(set(self._file_of.values()))

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor."""
        return self._counted(self._view(name)[:])

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """A new tensor with entries `start` .. `stop` - 1 along `dim` (0 or 1)."""
        view = self._view(name)
        return self._counted(view[start:stop] if dim == 0 else view[:, start:stop])

    def _counted(self, tensor: torch.Tensor) -> torch.Tensor:
        self._mapped += tensor.nbytes
        if self._mapped > _MAX_MAPPED:
            self._files, self._mapped = {}, 0
        return tensor

    def _view(self, name: str) -> Any:
        if name not in self._file_of:
            raise UserError("model.path", self.folder, f"its weights lack {name}")
        return self._open(self._file_of[name]).get_slice(name)

    def _open(self, file: Path) -> Any:
        files = self._files  # another thread may begin anew meanwhile
        if file not in files:
            if not file.is_file():
                raise UserError("model.path", file, "named by the index but not there; download the checkpoint again")
            try:
                files[file] = safe_open(file, framework="pt")
            except SafetensorError as error:
                raise UserError("model.path", file, f"not a whole safetensors file ({error})") from error
        return files[file]

    def _locate(self) -> dict[str, Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            return {name: self.folder / file for name, file in weight_map.items()}
        single = self.folder / "model.safetensors"
        if single.is_file():
            return {name: single for name in self._open(single).keys()}
        shards = sorted(self.folder.glob("*.safetensors"))
        found: dict[str, Path] = {}
        for shard in shards:  # without an index each says itself what it holds
            for name in self._open(shard).keys():
                if name in found:
                    remedy = f"holds {name}, and so does {found[name].name}: leave one of the files, or add an index"
                    raise UserError("model.path", shard, remedy)
                found[name] = shard
        if found:
            return found
        raise UserError("model.path", self.folder, "holds no .safetensors weights; save the model as safetensors")
