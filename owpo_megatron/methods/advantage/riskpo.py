"""RiskPO: what counts is the lower part of the distribution of scores over bundles of prompts, not their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import StepView


@dataclass(frozen=True)
class RiskPO(Clipped):
    """(ω CVaR + RVaR) / (ω + 1) of a bundle's score, over the spread of its scores; for every response of the bundle.

    A bundle is `bundle` prompts of the step in their order; its n-th score B is the sum of the rewards of the n-th
    responses. RVaR = (max(B - q_d, 0) - max(B - q_u, 0)) / (u - d), CVaR = -max(q_d - B, 0) / d. The quantiles q_d, q_u
    start as the first step's and follow by steps of the pinball loss; they are kept in checkpoints. Form of the
    authors' main script: tracked quantiles, uniform credit.
    """

    name = "riskpo"
    summary = "S with A = (ω CVaR + RVaR) / (ω + 1) of the bundle's score"
    paper = "RiskPO, Oct 2025 (authors' code)"

    bundle: int = hyper(5, "Prompts per bundle.", ge=1)
    lower: float = hyper(0.2, "Level d of the lower quantile.", gt=0, lt=1)
    upper: float = hyper(0.8, "Level u of the upper quantile.", gt=0, lt=1)
    tail: float = hyper(1.5, "Weight ω of the lower tail (CVaR).", ge=0)
    rate: float = hyper(0.1, "Step of the tracked quantiles.", ge=0)

    def advantages(self, step: StepView) -> Sequence[float]:
        out, groups = [0.0] * len(step.reward_N), step.groups
        bundles = [groups[start : start + self.bundle] for start in range(0, len(groups), self.bundle)]
        papers = [list(zip(*members, strict=False)) for members in bundles]
        scores = [[sum(step.reward_N[index] for index in paper) for paper in of] for of in papers]
        every = sorted(score for of in scores for score in of)
        if not every:
            return out
        low, high = (step.memory.setdefault(name, _quantile(every, level)) for name, level in self._levels())
        for of, values in zip(papers, scores, strict=True):
            spread = _std(values) + 1e-6
            for paper, score in zip(of, values, strict=True):
                for index in paper:
                    out[index] = self.risk(score, low, high) / spread
        for name, level in self._levels():
            below = sum(score <= step.memory[name] for score in every) / len(every)
            step.memory[name] += self.rate * (level - below)
        return out

    def risk(self, score: float, low: float, high: float) -> float:
        """The mixed measure of one bundle's score.

        Example:
            >>> [round(RiskPO().risk(score, 1, 4), 6) for score in (0, 1, 2.5, 5)]
            [-3.0, 0.0, 1.0, 2.0]
        """
        between = (max(score - low, 0) - max(score - high, 0)) / (self.upper - self.lower)
        return (between - self.tail * max(low - score, 0) / self.lower) / (self.tail + 1)

    def _levels(self) -> tuple[tuple[str, float], tuple[str, float]]:
        return ("lower", self.lower), ("upper", self.upper)


def _quantile(ordered: Sequence[float], level: float) -> float:
    """Linear interpolation between the neighbours."""
    place = level * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _std(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 1.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
