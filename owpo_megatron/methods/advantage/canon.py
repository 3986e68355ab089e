"""CANON: siblings are split by length or entropy, and compared with the other half and with their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import StepView


@dataclass(frozen=True)
class Canon(Clipped):
    """μ (R - mean of the other half) + (1 - μ) (R - mean of the own half), over L_max as with `dr_grpo`.

    The G // 2 shortest siblings are one half; ties keep their order. The factor α of the authors' code, which favours
    one half, is 1. μ = 1/2 with equal halves is R - mean.
    """

    name = "canon"
    summary = "S with A = μ against the other half + (1 - μ) against the own half, by length"
    paper = "arXiv:2509.23962"
    divisor = "sample_sums"

    clip_high: float = hyper(0.28, "Upper clip range of the ratio.", gt=0)
    across: float = hyper(1.0, "Weight μ of the comparison with the other half.", ge=0, le=1)

    def metric(self, step: StepView) -> Sequence[float]:
        """[N] what siblings are sorted by."""
        return step.length_N

    def advantages(self, step: StepView) -> Sequence[float]:
        metric_N, out = self.metric(step), [0.0] * len(step.reward_N)
        for group in step.groups:
            ranked = sorted(group, key=lambda index: metric_N[index])
            low, high = ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :]
            mean_low, mean_high = (_mean([step.reward_N[index] for index in half]) for half in (low, high))
            for half, own, other in ((low, mean_low, mean_high), (high, mean_high, mean_low)):
                baseline = self.across * other + (1 - self.across) * own
                for index in half:
                    out[index] = (step.reward_N[index] - baseline) / step.max_length
        return out


@dataclass(frozen=True)
class CanonEntropy(Canon):
    """The same with the mean entropy of a response's tokens, under the sampling policy, as the metric."""

    name = "canon_entropy"
    summary = "as canon, by mean entropy"
    needs_old_entropy = True

    def metric(self, step: StepView) -> Sequence[float]:
        return [float(entropy_L.double().mean()) for entropy_L in step.entropy_N]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
