"""Multi-teacher on-policy distillation: teacher log-ratios plus the verifier's advantage (paper, Eq. 3 and 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from owpo_megatron.methods.opd import distillation
from owpo_megatron.types import ObjectiveOut, ReferenceNeed, TokenBatch


@dataclass(frozen=True)
class Mopd:
    """sg(r) sg(ref_logp - logp + alpha A) logp.

    `ref_logp_T` holds, for each sample, the log-probs of the teacher that its prompt's domain is routed to.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    alpha: float = 5.0

    needs_reference: ClassVar[ReferenceNeed] = "teacher"
    needs_old: ClassVar[bool] = True
    dynamic_sampling: ClassVar[bool] = False

    def __call__(self, logp_T: torch.Tensor, batch: TokenBatch) -> ObjectiveOut:
        return distillation(logp_T, batch, self.clip_low, self.clip_high, self.alpha)
