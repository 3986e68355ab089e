"""Advantages that rise with a token's entropy: exploratory tokens learn more, none changes its direction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, Terms
from owpo_megatron.methods.metrics import policy_metrics
from owpo_megatron.methods.surrogate import clipped_surrogate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class EntropyShaped(Method):
    """S with A + min(α sg(H), abs(A) / κ), H the current policy's entropy at the token; κ > 1 keeps the sign of A."""

    name = "entropy_shaped"
    summary = "S with A + min(α H, abs(A) / κ)"
    paper = "arXiv:2506.14758"
    needs_entropy = True

    clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    clip_high: float = hyper(0.28, "Upper clip range of the ratio.", gt=0)
    alpha: float = hyper(0.4, "Factor α of the entropy.", ge=0)
    kappa: float = hyper(2.0, "κ: the bonus is at most abs(A) / κ.", gt=1)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        assert batch.entropy_C is not None
        bonus_C = (self.alpha * batch.entropy_C).minimum(batch.advantage_C.abs() / self.kappa)
        raised = replace(batch, advantage_C=batch.advantage_C + bonus_C)
        surrogate = clipped_surrogate(logp_C, raised, self.clip_low, self.clip_high)
        metrics = policy_metrics(logp_C, batch, surrogate.ratio_C, surrogate.clipped_C)
        return Terms(surrogate.value_C, metrics | {"advantage_bonus": bonus_C})
