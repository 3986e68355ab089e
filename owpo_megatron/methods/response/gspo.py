"""GSPO: one clipped ratio per response, for all of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Divisor, Method, SampleView, Terms
from owpo_megatron.methods.metrics import policy_metrics
from owpo_megatron.methods.surrogate import clipped_ratio

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Gspo(Method):
    """min(s A, clip(s) A) with s = exp(mean log r), as sg(s) π / sg(π) per token (GSPO-token: A may differ by token).

    The mean over a response's tokens, then over responses, as in the paper; verl's default is the mean over tokens.
    """

    name = "gspo"
    summary = "S with the geometric mean of the response's ratios"
    paper = "arXiv:2507.18071"
    coupling = "sample"
    divisor: ClassVar[Divisor] = "samples"

    clip_low: float = hyper(3e-4, "Lower clip range of the response's ratio.", gt=0, lt=1)
    clip_high: float = hyper(4e-4, "Upper clip range of the response's ratio.", gt=0)

    def prepare(self, samples: Sequence[SampleView]) -> list[dict[str, float | torch.Tensor]]:
        return [{"drift": (one.now_logp_L - one.old_logp_L).mean(), "now": one.now_logp_L} for one in samples]

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        # the response's ratio in value; each token's own log-prob carries the gradient
        ratio_C = (batch.given["drift"] + logp_C - batch.given["now"]).exp()
        surrogate = clipped_ratio(ratio_C, batch.advantage_C, self.clip_low, self.clip_high)
        return Terms(surrogate.value_C, policy_metrics(logp_C, batch, surrogate.ratio_C, surrogate.clipped_C))


@dataclass(frozen=True)
class Luspo(Gspo):
    """GSPO with every response's term times its length, which GSPO's mean over tokens divides by. As TRL's `luspo`."""

    name = "luspo"
    summary = "as gspo, times the response's length"
    paper = "arXiv:2602.05261"
    divisor = "sample_sums"

    clip_low: float = hyper(2e-3, "Lower clip range of the response's ratio.", gt=0, lt=1)
    clip_high: float = hyper(2.5e-3, "Upper clip range of the response's ratio.", gt=0)
