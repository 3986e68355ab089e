"""BNPO: rewards divided by a Beta density that follows the success rates of the step's prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import StepView


@dataclass(frozen=True)
class Bnpo(Clipped):
    """(R - p) / Beta(p; α, β), p the group's mean; rewards within [0, 1]. Form of the authors' code.

    a and b are fitted to mean and variance of p over the step's prompts by moments, α = max(1 + a / 3, 1),
    β = max(1 + b / 3, 1). Not what TRL calls `bnpo` (a token mean).
    """

    name = "bnpo"
    summary = "S with A = (R - p) / Beta(p; α, β)"
    paper = "arXiv:2506.02864"
    divisor = "sample_sums"

    clip_high: float = hyper(0.28, "Upper clip range of the ratio.", gt=0)
    most: float = hyper(1e6, "Largest factor 1 / Beta(p; α, β).", gt=0)

    def advantages(self, step: StepView) -> Sequence[float]:
        rates = [sum(step.reward_N[index] for index in group) / len(group) for group in step.groups]
        alpha, beta = fitted(rates)
        out = [0.0] * len(step.reward_N)
        for group, rate in zip(step.groups, rates, strict=True):
            factor = self.factor(min(max(rate, 0.0), 1.0), alpha, beta)
            for index in group:
                out[index] = factor * (step.reward_N[index] - rate)
        return out

    def factor(self, rate: float, alpha: float, beta: float) -> float:
        """1 / Beta(rate; alpha, beta), at most `most`."""
        log_constant = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
        density = rate ** (alpha - 1) * (1 - rate) ** (beta - 1) / math.exp(log_constant)
        return min(1 / density, self.most) if density > 0 else self.most


def fitted(rates: Sequence[float]) -> tuple[float, float]:
    """(α, β) of success rates; (1, 1), the flat density, where they do not vary or there is one."""
    mean = sum(rates) / max(len(rates), 1)
    variance = sum((rate - mean) ** 2 for rate in rates) / max(len(rates) - 1, 1)
    if variance == 0:
        return 1.0, 1.0
    total = mean * (1 - mean) / variance - 1
    return max(1 + total * mean / 3, 1.0), max(1 + total * (1 - mean) / 3, 1.0)
