"""DARS: more siblings for hard prompts, until their summed advantage catches up with that of a prompt at 1/2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.plan import Ask, PlanView, drawn_groups
from owpo_megatron.methods.sampling.base import Sampled, minus_mean


@dataclass(frozen=True)
class Dars(Sampled):
    """Count G siblings with success rate p < 1/2 (p = 0 counts as 1/(2 G)); with S = 2 p (1 - p) the summed |A| is G S
    and its peak G / 2. Then ceil((peak - G S) / S) more siblings are drawn, or, hard prompts first, ceil((2 (1 - p)
    peak - G S) / S), at most `most` in all. A = R - mean, clip 0.2, token mean (the authors' code, yangzhch6/DARS,
    without std)."""

    name = "dars"
    summary = "S with A = R - mean; more siblings for prompts that seldom succeed"
    paper = "arXiv:2508.13755"

    most: int = hyper(64, "Most siblings of a prompt.", ge=2)
    hard_first: bool = hyper(True, "Weigh hard prompts up (HW); false: equal treatment (ET).")

    def plan(self, view: PlanView) -> Sequence[Ask]:
        if view.round == 0:
            return drawn_groups(view)
        if view.round > 1:
            return []
        more = [self.more(view.success(group), view.group_size) for group in view.groups]
        return [Ask(view.prompt(index), count, group=index) for index, count in enumerate(more) if count]

    def more(self, success: float, size: int) -> int:
        """Siblings to add to a group of this size."""
        rate = success if success > 1e-6 else 0.5 / size
        if rate >= 0.5:
            return 0
        share = 2 * rate * (1 - rate)
        peak = 0.5 * size * (2 * (1 - rate) if self.hard_first else 1)
        return max(min(math.ceil((peak - size * share) / share), self.most - size), 0)

    def advantages(self, step: StepView) -> Sequence[float]:
        return minus_mean(step)
