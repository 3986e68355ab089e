"""Other forms of weights than plain safetensors, behind safetensors' own interface of slices.

.bin files are unpickled with `weights_only`, so that nothing in them is executed. FP8 values come with one scale per
block of the matrix (DeepSeek-V3: 128 x 128), MXFP4 ones (gpt-oss) with a power of two for each 32 of a row; both are
read as the bfloat16 weights that they stand for.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from owpo_megatron.errors import UserError

SCALE_SUFFIX = "_scale_inv"
BLOCKS, SCALES = "_blocks", "_scales"  # of a tensor in MXFP4
FP8 = "F8_E4M3"
# A code of FP4 (E2M1): sign, two bits of exponent, one of mantissa
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_SCALE_BIAS, _SCALE_NAN = 127, 255  # of E8M0, a power of two
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


class ExpertView:
    """One expert's entry of a tensor [experts, ...] that holds all of them."""

    def __init__(self, stack: Any, expert: int):
        self._stack, self._expert = stack, expert

    def get_shape(self) -> list[int]:
        return list(self._stack.get_shape())[1:]

    def get_dtype(self) -> str:
        return str(self._stack.get_dtype())

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._stack[(self._expert, *(index if isinstance(index, tuple) else (index,)))]


class Mxfp4View:
    """One expert's matrix in MXFP4 as bfloat16 weights (OCP Microscaling Formats 1.0): FP4 values times a power of two.

    Args:
        blocks: view of uint8 [experts, N, K / 32, 16]; a byte has two codes, the lower half first.
        scales: view of uint8 [experts, N, K / 32]: exponents of two, 127 too large; 255 is NaN.

    Values beyond bfloat16's range become infinite, as everywhere in bfloat16. The matrix is [K, N]: gpt-oss multiplies
    from the right, but packs along K.
    """

    def __init__(self, blocks: Any, scales: Any, expert: int):
        self._blocks, self._scales = ExpertView(blocks, expert), ExpertView(scales, expert)

    def get_shape(self) -> list[int]:
        rows, blocks, size = self._blocks.get_shape()
        return [2 * blocks * size, rows]

    def get_dtype(self) -> str:
        return "BF16"

    def __getitem__(self, index: Any) -> torch.Tensor:
        columns, rows = index if isinstance(index, tuple) else (index, slice(None))
        return dequantised(self._blocks[rows], self._scales[rows]).t()[columns].contiguous()


def dequantised(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """MXFP4: codes [N, K / 32, 16] and scales [N, K / 32], both uint8, as bfloat16 [N, K]."""
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)
    exponents = scales.double() - _SCALE_BIAS
    power = torch.where(scales == _SCALE_NAN, torch.nan, torch.exp2(exponents))
    return (_FP4.double()[codes.int()] * power[..., None]).flatten(-2).to(torch.bfloat16)
