"""CE-GPPO: tokens outside the clip range keep a bounded gradient, which steers the entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, Terms
from owpo_megatron.methods.metrics import policy_metrics

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class CeGppo(Method):
    """r A within the range; β1 (1 - low) r / sg(r) A below it for A < 0, β2 (1 + high) r / sg(r) A above it for A > 0.

    At least c A for A < 0. β1 = 0.75 is of the authors' 7B run, 0.5 of 1.5B; β1 = β2 = 1 is GPPO (arXiv:2508.07629).
    """

    name = "ce_gppo"
    summary = "r A; where PPO clips, β1 (1 - low) A or β2 (1 + high) A, with the gradient of log π"
    paper = "arXiv:2509.20712"
    groups = "mixed"
    idle_without_advantage = True

    clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    clip_high: float = hyper(0.2, "Upper clip range of the ratio.", gt=0)
    below: float = hyper(0.75, "β1: share of the gradient below the range, for A < 0; 0: PPO's none.", ge=0)
    above: float = hyper(1.0, "β2: share of the gradient above the range, for A > 0; 0: PPO's none.", ge=0)
    cap: float = hyper(10.0, "Largest ratio c of tokens with A < 0.", gt=1)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        ratio_C, advantage_C = (logp_C - batch.old_logp_C).exp(), batch.advantage_C
        below_C = (ratio_C < 1 - self.clip_low) & (advantage_C < 0)
        above_C = (ratio_C > 1 + self.clip_high) & (advantage_C > 0)
        one_C = (logp_C - logp_C.detach()).exp()  # 1, with the gradient of log π
        weight_C = (self.below * (1 - self.clip_low) * one_C).where(below_C, ratio_C)
        weight_C = (self.above * (1 + self.clip_high) * one_C).where(above_C, weight_C)
        value_C = weight_C * advantage_C
        value_C = value_C.maximum(self.cap * advantage_C).where(advantage_C < 0, value_C)
        cut_C = (ratio_C.detach() > self.cap) & (advantage_C < 0)
        metrics = policy_metrics(logp_C, batch, ratio_C.detach(), cut_C)
        return Terms(value_C, metrics | {"outside": below_C | above_C})
