"""OWPO with one of its ideas taken out. Each changes how w depends on the directional deviation, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from owpo_megatron.methods.owpo import Owpo


@dataclass(frozen=True)
class OwpoNoAsym(Owpo):
    """w = clip(exp(-|delta|)): the size of the deviation counts, its direction does not; w never exceeds 1."""

    def log_weight(self, delta_T: torch.Tensor) -> torch.Tensor:
        return -delta_T.abs()


@dataclass(frozen=True)
class OwpoNoLocking(Owpo):
    """w = 1 where the policy is ahead of the reference (delta > 0): gains are not locked."""

    def log_weight(self, delta_T: torch.Tensor) -> torch.Tensor:
        return -delta_T.clamp(max=0)


@dataclass(frozen=True)
class OwpoNoAccel(Owpo):
    """w = 1 where the policy lags behind the reference (delta < 0): alignment is not accelerated."""

    def log_weight(self, delta_T: torch.Tensor) -> torch.Tensor:
        return -delta_T.clamp(min=0)
