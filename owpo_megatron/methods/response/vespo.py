"""VESPO: a smooth weight on a response's whole importance ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, SampleView, Terms
from owpo_megatron.methods.metrics import policy_metrics

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Vespo(Method):
    """sg(φ) A log π, φ = W^k exp(λ (1 - W)), W = the product of the response's ratios. As TRL's `vespo`.

    log W is clamped to [log 1e-8, 20], as there.
    """

    name = "vespo"
    summary = "sg(W^k exp(λ (1 - W))) A log π, W = Π r"
    paper = "arXiv:2602.10693"
    coupling = "sample"

    k_pos: float = hyper(2.0, "Exponent k for A >= 0.", ge=0)
    lambda_pos: float = hyper(3.0, "Rate λ for A >= 0.", ge=0)
    k_neg: float = hyper(3.0, "Exponent k for A < 0.", ge=0)
    lambda_neg: float = hyper(2.0, "Rate λ for A < 0.", ge=0)

    def prepare(self, samples: Sequence[SampleView]) -> list[dict[str, float | torch.Tensor]]:
        return [
            {"log_w": (one.now_logp_L - one.old_logp_L).clamp(-20, 20).sum().clamp(math.log(1e-8), 20)}
            for one in samples
        ]

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        log_w_C, positive_C = batch.given["log_w"], batch.advantage_C >= 0
        k_C = self.k_pos * positive_C + self.k_neg * ~positive_C
        lambda_C = self.lambda_pos * positive_C + self.lambda_neg * ~positive_C
        phi_C = (k_C * log_w_C + lambda_C * (1 - log_w_C.exp())).exp()
        ratio_C = (logp_C.detach() - batch.old_logp_C).exp()
        metrics = policy_metrics(logp_C, batch, ratio_C, positive_C & ~positive_C)
        return Terms(phi_C * batch.advantage_C * logp_C, metrics | {"phi_sum": phi_C})
