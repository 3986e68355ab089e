"""GRPO: clipped surrogate and k3 penalty, mean over the tokens of a sample, then over samples (DeepSeekMath)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Divisor, Method, Refresh, Terms
from owpo_megatron.methods.surrogate import penalised_surrogate
from owpo_megatron.types import ReferenceNeed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Grpo(Method):
    """min(r A, clip(r) A) - beta k3(logp, ref_logp); every group takes part, the reference is fixed."""

    name = "grpo"
    summary = "S - β k3"
    paper = "arXiv:2402.03300; OWPO Eq. 1, B.4"
    divisor: ClassVar[Divisor] = "samples"
    reference = "all"
    refresh: ClassVar[Refresh] = "fixed"

    clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    clip_high: float = hyper(0.2, "Upper clip range of the ratio.", gt=0)
    beta: float = hyper(1e-3, "Coefficient β of the penalty.", ge=0)
    penalty: str = hyper("k3", "Form of the penalty: k3, or k2, the quadratic one.", choices=("k2", "k3"))

    @property
    def needs_reference(self) -> ReferenceNeed:
        return "all" if self.beta else "none"

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        return penalised_surrogate(logp_C, batch, self.clip_low, self.clip_high, self.beta, self.penalty)
