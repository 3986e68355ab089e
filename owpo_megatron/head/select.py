"""Which implementation a device gets, decided in one place."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch

from owpo_megatron.head.backend import Backend, ForwardBackend
from owpo_megatron.head.fp8 import Fp8Backend, Fp8Weight
from owpo_megatron.head.torch_backend import TorchBackend

BackendName = Literal["auto", "torch", "triton"]
"""auto: triton for CUDA tensors below float64 where Triton is installed, torch for all others."""


def exact_backend(weight_VH: torch.Tensor, inverse_temperature: float, name: BackendName) -> Backend:
    if _use_triton(weight_VH, name):
        from owpo_megatron.head.triton_backend import TritonBackend

        return TritonBackend(weight_VH, inverse_temperature)
    return TorchBackend(weight_VH, inverse_temperature)


def fp8_backend(
    weight_VH: torch.Tensor, fp8_weight: Fp8Weight | None, inverse_temperature: float, refine: bool, name: BackendName
) -> ForwardBackend:
    fp8_weight = fp8_weight or Fp8Weight(weight_VH)
    if _use_triton(weight_VH, name):
        from owpo_megatron.head.triton_fp8 import TritonFp8Backend

        return TritonFp8Backend(weight_VH, fp8_weight, inverse_temperature, refine)
    return Fp8Backend(weight_VH, fp8_weight, inverse_temperature, refine)


def _use_triton(weight_VH: torch.Tensor, name: BackendName) -> bool:
    if name != "auto":
        return name == "triton"
    return weight_VH.is_cuda and weight_VH.dtype != torch.float64 and importlib.util.find_spec("triton") is not None
