"""Which implementation a device gets, decided in one place."""

from __future__ import annotations

import torch

from owpo_megatron.kernels.backend import Backend, ForwardBackend
from owpo_megatron.kernels.fp8 import Fp8Backend, Fp8Weight
from owpo_megatron.kernels.torch_backend import TorchBackend


def exact_backend(weight_VH: torch.Tensor, inverse_temperature: float) -> Backend:
    return TorchBackend(weight_VH, inverse_temperature)


def fp8_backend(
    weight_VH: torch.Tensor, fp8_weight: Fp8Weight | None, inverse_temperature: float, refine: bool
) -> ForwardBackend:
    return Fp8Backend(weight_VH, fp8_weight or Fp8Weight(weight_VH), inverse_temperature, refine)
