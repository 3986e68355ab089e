"""IPO of prime-rl: a trust region on the probability itself, the same on both sides and for both signs of A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, Terms
from owpo_megatron.methods.metrics import policy_metrics

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ipo(Method):
    """r A where abs(π - π_old) ≤ δ, and -τ (log r)² on every token. As prime-rl's loss `ipo`.

    Unlike `dppo_tv` it also drops tokens that moved against the sign of A. prime-rl takes π_old from the engine.
    """

    name = "ipo"
    summary = "r A while abs(π - π_old) is at most δ, minus τ (log r)²"
    paper = "prime-rl (authors' code)"

    delta: float = hyper(0.1, "Largest change δ of a token's probability.", gt=0, le=1)
    tau: float = hyper(1e-3, "Coefficient τ of (log r)².", ge=0)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        log_ratio_C = logp_C - batch.old_logp_C
        far_C = (logp_C.detach().exp() - batch.old_logp_C.exp()).abs() > self.delta
        kept_C = (log_ratio_C.exp() * batch.advantage_C).masked_fill(far_C, 0)
        metrics = policy_metrics(logp_C, batch, log_ratio_C.detach().exp(), far_C)
        return Terms(kept_C - self.tau * log_ratio_C.square(), metrics)
