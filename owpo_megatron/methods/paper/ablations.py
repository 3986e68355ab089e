"""OWPO with one of its ideas taken out. Each changes how w depends on the directional deviation, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch
from owpo_megatron.methods.paper.owpo import Owpo, bounded_weights

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OwpoNoAsym(Owpo):
    """w = clip(exp(-|delta|)): the size of the deviation counts, its direction does not; w never exceeds 1.

    `asymmetry: log_ratio` is the other reading of "removes the dependency on the advantage sign": w = clip(exp(-z)).
    """

    name = "owpo_no_asym"
    summary = "as owpo, w = clip(exp(-abs z))"
    paper = "OWPO 5.4"

    asymmetry: str = hyper(
        "magnitude",
        "What w depends on without the sign of A: the magnitude of z, or z.",
        choices=("magnitude", "log_ratio"),
    )

    def log_weight(self, delta_C: torch.Tensor) -> torch.Tensor:
        return -delta_C.abs()

    def weights(self, logp_C: torch.Tensor, batch: ChunkBatch) -> torch.Tensor:
        if self.asymmetry == "magnitude":
            return super().weights(logp_C, batch)
        z_C = self.policy_of_weights(logp_C, batch).detach() - batch.ref_logp_C
        return bounded_weights(-z_C, batch.active_C, self.weight_low, self.weight_high)


@dataclass(frozen=True)
class OwpoNoLocking(Owpo):
    """w = 1 where the policy is ahead of the reference (delta > 0): gains are not locked."""

    name = "owpo_no_locking"
    summary = "as owpo, w = 1 where δ > 0"
    paper = "OWPO 5.4"

    def log_weight(self, delta_C: torch.Tensor) -> torch.Tensor:
        return -delta_C.clamp(max=0)


@dataclass(frozen=True)
class OwpoNoAccel(Owpo):
    """w = 1 where the policy lags behind the reference (delta < 0): alignment is not accelerated."""

    name = "owpo_no_accel"
    summary = "as owpo, w = 1 where δ < 0"
    paper = "OWPO 5.4"

    def log_weight(self, delta_C: torch.Tensor) -> torch.Tensor:
        return -delta_C.clamp(min=0)
