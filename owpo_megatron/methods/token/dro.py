"""DRO, as in Kimi k1.5: a squared penalty on the log-ratio instead of a clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, Terms
from owpo_megatron.methods.metrics import policy_metrics

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dro(Method):
    """A log π - (β / 2) (log r)². As verl's `dro`, which has no default for β; 0.1 is the τ of ROLL's Kimi loss."""

    name = "dro"
    summary = "A log π - (β / 2) (log r)²"
    paper = "arXiv:2405.19107; Kimi k1.5, arXiv:2501.12599"

    beta: float = hyper(0.1, "Coefficient β of the squared log-ratio.", ge=0)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        log_ratio_C = logp_C - batch.old_logp_C
        value_C = batch.advantage_C * logp_C - self.beta / 2 * log_ratio_C.square()
        ratio_C = log_ratio_C.detach().exp()
        return Terms(value_C, policy_metrics(logp_C, batch, ratio_C, ratio_C != ratio_C))
