"""Reads tensors, or slices of them, from an HF folder's safetensors files without loading the rest."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from owpo_megatron.errors import UserError
from owpo_megatron.families.config_file import GGUF, read_config_file, text_fields, text_name
from owpo_megatron.families.forms import BLOCKS, SCALE_SUFFIX, SCALES, BinFile, BlockFp8View, ExpertView, Mxfp4View
from owpo_megatron.families.stacks import is_stack, member, stack_of

_MAX_MAPPED = 256 * 2**20


class HFReader:
    """The tensors of an HF folder: one `model.safetensors`, or shards with or without an index file; or .bin files.

    Weights in FP8 with a scale per block, and in MXFP4, are read as bfloat16 (see `forms`); tensors of all experts
    together expert by expert (see `stacks`).

    Files are memory-mapped and opened when first needed. What was read stays mapped, and counts as this process's
    memory, until the files are closed: they are after every 256 MB, and opened again when needed.

    Raises:
        UserError: the folder has no weights that can be read, or a file that the index names is missing or broken.

    Example:
        HFReader(path).slice("model.embed_tokens.weight", 0, 0, 1000)  # the first 1000 rows
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._files: dict[Path, Any] = {}
        self._mapped = 0  # bytes read since the files were opened
        self._file_of, self._stored_as = self._text_alone(self._locate())
        self._scales = {name for name in self._file_of if name.endswith(SCALE_SUFFIX)}

    def names(self) -> list[str]:
        names: list[str] = []
        for name in self._file_of:
            stack = name.removesuffix(BLOCKS)
            if name in self._scales or (name.endswith(SCALES) and name.removesuffix(SCALES) + BLOCKS in self._file_of):
                continue
            if is_stack(stack):
                number = self._stored(name).get_shape()[0]
                names += [member(stack, expert) for expert in range(number)]
            else:
                names.append(name)
        return names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._view(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return the dtype as the file names it, e.g. BF16."""
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
        stack = None if name in self._file_of else stack_of(name)
        if stack and stack[0] in self._file_of:
            return ExpertView(self._stored(stack[0]), stack[1])
        if stack and {stack[0] + BLOCKS, stack[0] + SCALES} <= self._file_of.keys():
            return Mxfp4View(self._stored(stack[0] + BLOCKS), self._stored(stack[0] + SCALES), stack[1])
        if name not in self._file_of:
            raise UserError("model.path", self.folder, f"its weights lack {name}")
        if name + SCALE_SUFFIX not in self._scales:
            return self._stored(name)
        return BlockFp8View(self._stored(name), self._stored(name + SCALE_SUFFIX)[:], self._block)

    def _stored(self, name: str) -> Any:
        """A view of a tensor as the file has it."""
        file = self._file_of[name]
        try:
            return self._open(file).get_slice(self._stored_as.get(name, name))
        except SafetensorError as error:
            raise UserError("model.path", file, f"its index promises {name}, and it is not there") from error

    @cached_property
    def _block(self) -> tuple[int, int]:
        """Rows and columns of the blocks that share a scale."""
        config = json.loads((self.folder / "config.json").read_text()).get("quantization_config") or {}
        rows, columns = config.get("weight_block_size") or (128, 128)
        return rows, columns

    def _open(self, file: Path) -> Any:
        files = self._files  # another thread may begin anew meanwhile
        if file not in files:
            if not file.is_file():
                raise UserError("model.path", file, "named by the index but not there; download the checkpoint again")
            try:
                files[file] = safe_open(file, framework="pt") if file.suffix == ".safetensors" else BinFile(file)
            except SafetensorError as error:
                raise UserError("model.path", file, f"not a whole safetensors file ({error})") from error
        return files[file]

    def _named_by(self, index: Path) -> dict[str, Path]:
        """The file of each tensor, as an index has it."""
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            files = {str(name): self.folder / Path(file).name for name, file in weight_map.items() if file}
            inside = all(Path(file).name == file for file in weight_map.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            remedy = f"no index of weights ({type(error).__name__}: {error}); download the checkpoint again"
            raise UserError("model.path", index, remedy) from error
        if not inside:
            raise UserError("model.path", index, "names a file outside of the folder; download the checkpoint again")
        return files

    def _text_alone(self, located: dict[str, Path]) -> tuple[dict[str, Path], dict[str, str]]:
        """(the file of each tensor, its name in the file where it is another) without the parts of other models."""
        if not (self.folder / "config.json").is_file() or text_fields(read_config_file(self.folder)) is None:
            return located, {}
        names = {own: name for name in located if (own := text_name(name)) is not None}
        return {own: located[name] for own, name in names.items()}, names

    def _locate(self) -> dict[str, Path]:
        for kind in ("model.safetensors", "pytorch_model.bin"):
            index, single = self.folder / f"{kind}.index.json", self.folder / kind
            if index.is_file():
                return self._named_by(index)
            if single.is_file():
                return {name: single for name in self._open(single).keys()}
        shards = sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("pytorch_model*.bin"))
        found: dict[str, Path] = {}
        for shard in shards:  # without an index each has its own list
            for name in self._open(shard).keys():
                if name in found:
                    remedy = f"holds {name}, and so does {found[name].name}: leave one of the files, or add an index"
                    raise UserError("model.path", shard, remedy)
                found[name] = shard
        if found:
            return found
        if any(self.folder.glob("*.gguf")):
            raise UserError("model.path", self.folder, GGUF)
        raise UserError("model.path", self.folder, "holds no .safetensors weights; save the model as safetensors")
