"""Other forms of weights than plain safetensors, behind safetensors' own interface of slices.

.bin files are unpickled with `weights_only`, so that nothing in them is executed. FP8 values come with one scale per
block of the matrix (DeepSeek-V3: 128 x 128) and are read as the bfloat16 weights that they stand for.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from owpo_megatron.errors import UserError

SCALE_SUFFIX = "_scale_inv"
FP8 = "F8_E4M3"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class BinFile:
    """A pytorch_model*.bin file, memory-mapped where its format allows."""

    def __init__(self, file: Path):
        try:
            try:
                self._tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format before torch 1.6 cannot be mapped
                self._tensors = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError("model.path", file, f"not a whole file of weights alone ({first})") from error

    def keys(self) -> list[str]:
        return [name for name, value in self._tensors.items() if isinstance(value, torch.Tensor)]

    def get_slice(self, name: str) -> TensorView:
        return TensorView(self._tensors[name])


class TensorView:
    """A tensor in memory, as safetensors gives views of a file."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _NAMES.get(self._tensor.dtype, str(self._tensor.dtype))

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index].clone()


class BlockFp8View:
    """FP8 values and their scales as bfloat16 weights: value * scale, computed in float32, rounded once.

    Args:
        values: view of the matrix [N, K] in float8_e4m3fn.
        scales: [ceil(N / rows), ceil(K / columns)] in float32.
        block: (rows, columns) of a block.
    """

    def __init__(self, values: Any, scales: torch.Tensor, block: tuple[int, int]):
        self._values, self._scales, self._block = values, scales.float(), block

    def get_shape(self) -> list[int]:
        return list(self._values.get_shape())

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        values = self._values[rows] if columns == slice(None) else self._values[rows, columns]
        size = self.get_shape()
        row = torch.arange(size[0])[rows] // self._block[0]
        column = torch.arange(size[1])[columns] // self._block[1]
        return (values.float() * self._scales[row[:, None], column]).to(torch.bfloat16)
