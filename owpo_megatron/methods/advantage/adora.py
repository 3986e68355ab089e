"""ADORA: prompts whose right answers are not longer than their wrong ones count less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import StepView, normalised_in_groups


@dataclass(frozen=True)
class Adora(Clipped):
    """The group's z-score, times λ where its longest right answer is not longer than its wrong ones on average.

    Wrong answers of `long` tokens or more are left out of that mean; without any wrong one the group keeps its weight.
    The language-model version of the authors' code, without its bonus for lengths.
    """

    name = "adora"
    summary = "S with A times λ where right answers are not the longer ones"
    paper = "ADORA, Feb 2026 (authors' code)"

    discount: float = hyper(0.1, "Factor λ of a group without the length property; 1: GRPO's advantage.", ge=0, le=1)
    long: int = hyper(4054, "Wrong answers with so many tokens are taken as cut off.", ge=1)

    def advantages(self, step: StepView) -> Sequence[float]:
        out = normalised_in_groups(step, self.advantage_std)
        for group in step.groups:
            right = [step.length_N[index] for index in group if step.reward_N[index] > 0]
            wrong = [step.length_N[index] for index in group if step.reward_N[index] <= 0]
            wrong = [length for length in wrong if length < self.long]
            if wrong and max(right, default=0) <= sum(wrong) / len(wrong):
                for index in group:
                    out[index] *= self.discount
        return out
