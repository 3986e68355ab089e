"""SAPO: a smooth gate on the ratio instead of a clip, sharper for negative advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, Terms
from owpo_megatron.methods.metrics import policy_metrics

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sapo(Method):
    """(4 / τ) σ(τ (r - 1)) A: its gradient at r = 1 is A, and fades out on both sides; as verl and TRL."""

    name = "sapo"
    summary = "(4 / τ) σ(τ (r - 1)) A"
    paper = "arXiv:2511.20347"
    divisor = "samples"

    tau_pos: float = hyper(1.0, "Sharpness τ of the gate for A > 0.", gt=0)
    tau_neg: float = hyper(1.05, "Sharpness τ of the gate for A <= 0.", gt=0)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        ratio_C = (logp_C - batch.old_logp_C).exp()
        positive_C = batch.advantage_C > 0
        tau_C = self.tau_pos * positive_C + self.tau_neg * ~positive_C
        gate_C = (tau_C * (ratio_C - 1)).sigmoid() * 4 / tau_C
        metrics = policy_metrics(logp_C, batch, ratio_C.detach(), positive_C & ~positive_C)  # no gradient is cut
        return Terms(gate_C * batch.advantage_C, metrics)
