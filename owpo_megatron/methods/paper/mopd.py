"""Multi-teacher on-policy distillation: teacher log-ratios plus the verifier's advantage (paper, Eq. 3 and 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, Terms
from owpo_megatron.methods.paper.opd import distillation

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Mopd(Method):
    """sg(r) sg(ref_logp - logp + alpha A) logp.

    The reference log-probs of a sample are those of the teacher that its prompt's domain is routed to.
    """

    name = "mopd"
    summary = "sg(r) sg(-z + α A) log π"
    paper = "OWPO Eq. 3, 4"
    divisor = "samples"
    reference = "teacher"
    refresh = "fixed"

    clip_low: float = hyper(0.2, "A token with a ratio below 1 - clip_low is dropped.", gt=0, lt=1)
    clip_high: float = hyper(0.28, "A token with a ratio above 1 + clip_high is dropped.", gt=0)
    alpha: float = hyper(5.0, "Weight α of the outcome advantage.", ge=0)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        return distillation(logp_C, batch, self.clip_low, self.clip_high, self.alpha)
