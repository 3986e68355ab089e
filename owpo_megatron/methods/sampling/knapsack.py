"""Knapsack RL: a step's siblings go to the prompts where they are worth most."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.plan import Ask, PlanView
from owpo_megatron.methods.sampling.base import Sampled


@dataclass(frozen=True)
class Knapsack(Sampled):
    """n siblings of a prompt with success rate p are worth (1 - p^n - (1 - p)^n) p (1 - p)^2: the chance of a mixed
    group times the gain. A step has prompts x group_size siblings; each prompt gets `least`, the rest goes sibling by
    sibling to the largest gain, which is the exact optimum, as the value is concave in n. p is the mean of earlier
    visits; a prompt that was never drawn gets group_size. Source: the authors' allocation code."""

    name = "knapsack_rl"
    summary = "as GRPO's S; siblings of a prompt by a knapsack over success rates"
    paper = "arXiv:2509.25849"
    keeps_ledger = True

    least: int = hyper(2, "Fewest siblings of a prompt.", ge=2)
    most: int = hyper(128, "Most siblings of a prompt.", ge=2)

    def plan(self, view: PlanView) -> Sequence[Ask]:
        if view.round:
            return []
        prompts = view.take(view.prompts_per_step)
        rates = [None if (past := view.record(prompt)) is None else past.mean for prompt in prompts]
        counts = self.allocation(rates, view.group_size)
        return [Ask(prompt, count) for prompt, count in zip(prompts, counts, strict=True)]

    def allocation(self, rates: Sequence[float | None], size: int) -> list[int]:
        """Siblings of each prompt, `size` on average; None: never drawn."""
        counts = [size if rate is None else min(self.least, size) for rate in rates]
        left = size * len(rates) - sum(counts)
        # of equal gains (all are 0 where nothing was learnt yet) the prompt with fewer siblings comes first
        heap = [(-gain(rate, counts[at]), counts[at], at) for at, rate in enumerate(rates) if rate is not None]
        heapq.heapify(heap)
        while left and heap:
            _, count, at = heapq.heappop(heap)
            if count < self.most:
                counts[at], left = count + 1, left - 1
                heapq.heappush(heap, (-gain(rates[at] or 0.0, count + 1), count + 1, at))
        return counts


def worth(rate: float, count: int) -> float:
    """Value of this many siblings of a prompt with this success rate."""
    return (1 - rate**count - (1 - rate) ** count) * rate * (1 - rate) ** 2


def gain(rate: float, count: int) -> float:
    """Value of one more sibling than `count`."""
    return worth(rate, count + 1) - worth(rate, count)
