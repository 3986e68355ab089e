"""FP8 log-probs that are good enough for a ratio: FP8 over the whole vocabulary, the columns that matter again exactly.

e4m3 has three bits of mantissa: log-probs from it alone are off by 0.01 to 0.03 on average, whatever the scales are
per. A softmax is decided by its largest terms, so the target and the best candidates of every row are computed again
from the unquantised operands, and FP8 is left with the tail. All of them or none: with only the target exact, its
error no longer cancels with that of the log-sum-exp, and the result is worse than FP8 alone.

Shapes: C rows of a chunk, H hidden, V columns on this rank, N refined columns of a row.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any, Protocol

import torch

from owpo_megatron.errors import UserError
from owpo_megatron.head.backend import wide
from owpo_megatron.head.tail import Moments
from owpo_megatron.head.torch_backend import TorchBackend

E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
_ROWS_AT_ONCE = 8192  # of a tensor that is quantised
CANDIDATES = 32  # 16 already give a mean error of 2e-4; flat distributions need more


def quantise(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (e4m3 values, fp32 scale) with values * scale ~ tensor: one scale per tensor, by its largest value.

    By blocks of rows: no copy of the whole tensor in float32 (2.3 GiB for a vocabulary of 152 k).
    """
    low, high = torch.aminmax(tensor)
    scale = torch.maximum(-low, high).float().clamp(min=1e-12) / E4M3_MAX
    values = torch.empty_like(tensor, dtype=torch.float8_e4m3fn)
    for part, source in zip(values.split(_ROWS_AT_ONCE), tensor.split(_ROWS_AT_ONCE), strict=True):
        part.copy_(source.float() / scale)
    return values, scale


class Fp8Weight:
    """A weight quantised once for all passes of one version. [V, H], e4m3, one scale.

    Products are made by Transformer Engine's FP8 GEMM where it is installed, by torch._scaled_mm on a GPU without it,
    and elsewhere by a float32 GEMM of the quantised values, which rounds as FP8 does and is not faster than exact.
    """

    def __init__(self, weight_VH: torch.Tensor):
        self._product = _best_product(weight_VH)
        self.values_VH, self.scale = self._product.values_VH, self._product.scale

    def logits(self, h_CH: torch.Tensor, into_CV: torch.Tensor | None = None) -> torch.Tensor:
        """h weight^T in float32 [C, V].

        Args:
            into_CV: contiguous memory of whole tiles (`whole_tiles` of both sizes, or more rows) for the result, so
                that one buffer does for all chunks.
        """
        return self._product(h_CH, into_CV)

    def screened(self, h_CH: torch.Tensor, into_CV: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(the same, h as it was quantised [C, H] in float32)."""
        operand = self._product.quantised(h_CH)
        values_CH, scale = self._product.parts(operand)
        quantised_CH = values_CH[: len(h_CH), : h_CH.shape[1]].float() * scale
        return self._product.multiplied(operand, len(h_CH), into_CV), quantised_CH


class Fp8Backend(TorchBackend):
    """TorchBackend whose logits are in FP8, refined or raw; its backward products are those of the exact weight.

    Args:
        weight_VH: the same weight unquantised, for the refinement and the backward.
    """

    def __init__(self, weight_VH: torch.Tensor, fp8_weight: Fp8Weight, inverse_temperature: float, refine: bool):
        super().__init__(weight_VH, inverse_temperature)
        self._fp8_weight = fp8_weight
        self._moments = Moments.of(weight_VH, fp8_weight.values_VH, fp8_weight.scale) if refine else None

    def _logits(self, h_CH: torch.Tensor, column_C: torch.Tensor) -> torch.Tensor:
        logits_CV, quantised_CH = self._fp8_weight.screened(h_CH)
        logits_CV = logits_CV.to(wide(h_CH)).mul_(self._inverse_temperature)
        columns = logits_CV.shape[1]
        if self._moments is None or not columns:
            return logits_CV
        best_CN = logits_CV.topk(min(CANDIDATES, columns), dim=1).indices
        column_CN = torch.cat([best_CN, column_C.clamp(min=0)[:, None]], dim=1)
        exact_CN = exact_logits(h_CH, self._weight_VH, column_CN) * self._inverse_temperature
        if columns > CANDIDATES:
            error = self._moments.of_rows(h_CH, quantised_CH)
            shift_C = error.shift(_tail_mean(logits_CV, column_CN), self._inverse_temperature)
            logits_CV.add_(shift_C[:, None])
        return logits_CV.scatter_(1, column_CN, exact_CN)


def _tail_mean(logits_CV: torch.Tensor, column_CN: torch.Tensor) -> torch.Tensor:
    """[C] mean of the logits without those columns, weighted with their probabilities; NaN where nothing is left."""
    p_CV = torch.softmax(logits_CV.scatter(1, column_CN, -torch.inf), dim=1)
    return torch.bmm(p_CV[:, None, :], logits_CV[:, :, None])[:, 0, 0]


def exact_logits(h_CH: torch.Tensor, weight_VH: torch.Tensor, column_CN: torch.Tensor) -> torch.Tensor:
    """[C, N] products of each row with its own columns, in float32 (float64)."""
    dtype = wide(h_CH)
    out_CN = torch.empty(column_CN.shape, dtype=dtype, device=h_CH.device)
    rows = max((16 << 20) // (column_CN.shape[1] * weight_VH.shape[1]), 1)  # gathered at a time: 64 MB
    for start in range(0, len(h_CH), rows):
        part = slice(start, start + rows)
        weight_CNH = weight_VH[column_CN[part]].to(dtype)
        out_CN[part] = torch.bmm(weight_CNH, h_CH[part].to(dtype)[:, :, None])[:, :, 0]
    return out_CN


class _Product(Protocol):
    """An FP8 GEMM with one weight: its values [V, H] in e4m3, maybe padded, and their scale."""

    values_VH: torch.Tensor
    scale: torch.Tensor

    def quantised(self, h_CH: torch.Tensor) -> Any:
        """The left operand."""

    def parts(self, operand: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(its e4m3 values, maybe padded; their scale): the operand itself, unless a library wraps them."""
        values_CH, scale = operand
        return values_CH, scale

    def multiplied(self, operand: Any, rows: int, into_CV: torch.Tensor | None = None) -> torch.Tensor:
        """The product's first `rows` rows, of the weight's columns without padding."""

    def __call__(self, h_CH: torch.Tensor, into_CV: torch.Tensor | None = None) -> torch.Tensor:
        return self.multiplied(self.quantised(h_CH), len(h_CH), into_CV)


class _Simulated(_Product):
    """Rounds both operands to e4m3 and multiplies in float32."""

    def __init__(self, weight_VH: torch.Tensor):
        self.values_VH, self.scale = quantise(weight_VH)
        self._weight_VH = self.values_VH.float().mul_(self.scale)

    def quantised(self, h_CH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantise(h_CH)

    def multiplied(
        self, operand: tuple[torch.Tensor, torch.Tensor], rows: int, into_CV: torch.Tensor | None = None
    ) -> torch.Tensor:
        values_CH, scale = operand
        out = None if into_CV is None else into_CV[:rows, : len(self._weight_VH)]
        return torch.mm(values_CH.float().mul_(scale), self._weight_VH.t(), out=out)


class _ScaledMm(_Product):
    """cuBLASLt's FP8 GEMM through torch, of any shape: it wants multiples of 16, so the FP8 copies are padded."""

    def __init__(self, weight_VH: torch.Tensor):
        self._columns = len(weight_VH)
        self.values_VH, self.scale = quantise(_with_whole_tiles(weight_VH))

    def quantised(self, h_CH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return quantise(_with_whole_tiles(h_CH))

    def multiplied(
        self, operand: tuple[torch.Tensor, torch.Tensor], rows: int, into_CV: torch.Tensor | None = None
    ) -> torch.Tensor:
        values_CH, scale = operand
        out = torch._scaled_mm(
            values_CH, self.values_VH.t(), scale_a=scale, scale_b=self.scale, out_dtype=torch.float32,
            use_fast_accum=False, out=None if into_CV is None else into_CV[: len(values_CH)],
        )  # fmt: skip
        return out[:rows, : self._columns]


class _TransformerEngine(_Product):
    """Transformer Engine's FP8 GEMM with current scaling. Not run on a GPU yet."""

    def __init__(self, weight_VH: torch.Tensor):
        import transformer_engine_torch as tex  # type: ignore[import-not-found]
        from transformer_engine.pytorch.cpp_extensions import general_gemm
        from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer

        if "workspace" in inspect.signature(general_gemm).parameters:
            remedy = "general_gemm of this version is called in another way: install 2.10 or newer, or model.head=exact"
            raise UserError("Transformer Engine", importlib.metadata.version("transformer-engine"), remedy)
        self._quantise = Float8CurrentScalingQuantizer(
            tex.DType.kFloat8E4M3, device=weight_VH.device, rowwise=True, columnwise=False
        )
        self._gemm = general_gemm
        self._columns = len(weight_VH)
        self._weight_VH = self._quantise(_with_whole_tiles(weight_VH))
        self.values_VH, self.scale = self.parts(self._weight_VH)

    def quantised(self, h_CH: torch.Tensor) -> Any:
        return self._quantise(_with_whole_tiles(h_CH))

    def parts(self, operand: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Its tensor keeps bytes and the inverse of what they were multiplied by."""
        return operand._data.view(torch.float8_e4m3fn), operand._scale_inv

    def multiplied(self, operand: Any, rows: int, into_CV: torch.Tensor | None = None) -> torch.Tensor:
        out, *_ = self._gemm(
            self._weight_VH, operand, out_dtype=torch.float32, layout="TN", use_split_accumulator=True,
            out=None if into_CV is None else into_CV[: whole_tiles(rows)],
        )  # fmt: skip
        return out[:rows, : self._columns]


def whole_tiles(size: int) -> int:
    """The next multiple of 16."""
    return -(-size // 16) * 16


def _with_whole_tiles(matrix: torch.Tensor) -> torch.Tensor:
    """Rows and columns of zeros up to the next multiples of 16, which cuBLAS's FP8 GEMM wants of every dimension."""
    rows, columns = matrix.shape
    padding = (0, whole_tiles(columns) - columns, 0, whole_tiles(rows) - rows)
    return torch.nn.functional.pad(matrix, padding) if any(padding) else matrix


def _best_product(weight_VH: torch.Tensor) -> _Product:
    if not weight_VH.is_cuda or torch.cuda.get_device_capability(weight_VH.device) < (8, 9):
        return _Simulated(weight_VH)  # a GEMM in FP8 needs Ada or later
    try:
        return _TransformerEngine(weight_VH)
    except ImportError:
        return _ScaledMm(weight_VH)
