"""ReMax: the reward of a greedy response is the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.plan import Ask, PlanView, drawn_groups
from owpo_megatron.methods.sampling.base import Sampled

GREEDY = 0.0


@dataclass(frozen=True)
class ReMax(Sampled):
    """A = R - R(greedy); the greedy response is graded and not trained on. verl's estimator `remax` with its standard
    loss (clip 0.2, token mean); the paper's own loss has no ratio."""

    name = "remax"
    summary = "S with A = R - R of a greedy response"
    paper = "arXiv:2310.10505"

    def plan(self, view: PlanView) -> Sequence[Ask]:
        asks = drawn_groups(view)
        first = len(view.groups)
        greedy = [
            Ask(ask.prompt, 1, group=first + index, temperature=GREEDY, origin="baseline")
            for index, ask in enumerate(asks)
        ]
        return [*asks, *greedy]

    def advantages(self, step: StepView) -> Sequence[float]:
        told = list(zip(step.group_N, step.reward_N, step.origin_N, strict=True))
        baseline = {group: reward for group, reward, origin in told if origin == "baseline"}
        return [reward - baseline.get(group, 0.0) for group, reward, _ in told]
