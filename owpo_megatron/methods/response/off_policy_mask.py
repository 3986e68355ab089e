"""Off-policy sequence mask: wrong answers that the policy has moved away from leave the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, SampleView, Terms
from owpo_megatron.methods.metrics import policy_metrics
from owpo_megatron.methods.surrogate import clipped_surrogate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OffPolicyMask(Method):
    """S; 0 for a response with A < 0 whose mean of log π_old - log π exceeds δ. Masked tokens stay in the divisor.

    As TRL's off-policy sequence mask. The paper gives no number for δ.
    """

    name = "off_policy_mask"
    summary = "S, without wrong answers whose mean of -log r exceeds δ"
    paper = "DeepSeek-V3.2, arXiv:2512.02556"
    coupling = "sample"
    divisor = "samples"

    clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    clip_high: float = hyper(0.2, "Upper clip range of the ratio.", gt=0)
    delta: float = hyper(0.1, "Largest mean of log π_old - log π, δ.", gt=0)

    def prepare(self, samples: Sequence[SampleView]) -> list[dict[str, float | torch.Tensor]]:
        drifts = [float((one.old_logp_L - one.now_logp_L).mean()) for one in samples]
        return [
            {"kept": (one.advantage_L >= 0).to(one.now_logp_L.dtype).clamp(min=float(drift <= self.delta))}
            for one, drift in zip(samples, drifts, strict=True)
        ]

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        kept_C, surrogate = batch.given["kept"], clipped_surrogate(logp_C, batch, self.clip_low, self.clip_high)
        metrics = policy_metrics(logp_C, batch, surrogate.ratio_C, surrogate.clipped_C)
        return Terms(surrogate.value_C * kept_C, metrics | {"kept_sum": kept_C})
