"""SPO, single-stream policy optimisation: no groups; a tracker of each prompt's success is the baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.plan import Ask, PlanView
from owpo_megatron.methods.sampling.base import Sampled, whitened
from owpo_megatron.types import Group, PromptRecord


@dataclass(frozen=True)
class Spo(Sampled):
    """A = R - p, whitened over the batch, p = a / (a + b) before the step; then a <- rho a + R, b <- rho b + 1 - R.

    One response per prompt, to as many prompts as prompts_per_step x group_size. They are chosen of `candidates` times
    as many, without repetition, in proportion to sqrt(p (1 - p)) + 0.05. Where the authors' code (verl-recipe/spo) has
    two forms, this has the constant rho (its `rho.type: constant`, between the clips 0.875 and 0.96 of the other one,
    which follows the drift of log-probs) and counts that begin at 1/2 and 1/2 (its start without offline samples)."""

    name = "spo"
    summary = "S with A = R - tracked success of the prompt, whitened over the batch"
    paper = "arXiv:2509.13232"
    keeps_ledger = True

    rho: float = hyper(0.9, "Discount of a prompt's earlier counts at each visit.", gt=0, le=1)
    candidates: float = hyper(1.0, "Prompts of the stream per prompt that is asked; 1: none is left out.", ge=1)
    explore: float = hyper(0.05, "Added to a prompt's weight sqrt(p (1 - p)) when prompts are chosen.", gt=0)

    @property
    def forgetting(self) -> float:
        return self.rho

    @property
    def first_counts(self) -> tuple[float, float]:
        return 0.5, 0.5

    def plan(self, view: PlanView) -> Sequence[Ask]:
        if view.round:
            return []
        wanted = view.prompts_per_step * view.group_size
        candidates = view.take(math.ceil(wanted * self.candidates))
        # the smallest of exponential times with these rates: a draw without repetition by weight
        times = [view.random.expovariate(self.weight(view.record(prompt))) for prompt in candidates]
        chosen = sorted(sorted(range(len(candidates)), key=times.__getitem__)[:wanted])
        return [Ask(candidates[index], 1) for index in chosen]

    def keep(self, view: PlanView) -> Sequence[Group]:
        return view.groups

    def weight(self, past: PromptRecord | None) -> float:
        rate = tracked(past)
        return math.sqrt(rate * (1 - rate)) + self.explore

    def advantages(self, step: StepView) -> Sequence[float]:
        away = [reward - tracked(past) for reward, past in zip(step.reward_N, step.past_N, strict=True)]
        return whitened(away, step.counts_N)


def tracked(past: PromptRecord | None) -> float:
    """Success rate of a prompt by its Beta counts; 1/2 before its first visit."""
    return 0.5 if past is None else past.right / (past.right + past.wrong)
