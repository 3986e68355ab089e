"""CISPO: the ratio weighs the gradient of every token and cuts none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, Terms
from owpo_megatron.methods.metrics import policy_metrics

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Cispo(Method):
    """sg(clip(r, floor, cap)) A log π.

    Two readings exist. The default is TRL's: a cap on the ratio itself and no lower bound. verl's clips to
    [1 - ε_low, 1 + ε_high]: `floor: 0.8` and `cap: 1.2` for its 0.2.
    """

    name = "cispo"
    summary = "sg(clip(r, floor, cap)) A log π"
    paper = "arXiv:2506.13585"

    floor: float = hyper(0.0, "Smallest weight.", ge=0, le=1)
    cap: float = hyper(5.0, "Largest weight.", gt=1)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        ratio_C = (logp_C.detach() - batch.old_logp_C).exp()
        outside_C = (ratio_C > self.cap) | (ratio_C < self.floor)
        weight_C = ratio_C.clamp(self.floor, self.cap)
        metrics = policy_metrics(logp_C, batch, ratio_C, outside_C & ~outside_C)  # no gradient is cut
        return Terms(weight_C * batch.advantage_C * logp_C, metrics | {"ratio_capped": outside_C})
