"""REINFORCE++: rewards whitened over all response tokens of the step, without groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.normalise import whitened_over_tokens


@dataclass(frozen=True)
class ReinforcePP(Clipped):
    """Discount 1 and no KL in the reward; otherwise verl's `reinforce_plus_plus`."""

    name = "reinforce_pp"
    summary = "S with A = R whitened over the step's tokens"
    paper = "arXiv:2501.03262"

    def advantages(self, step: StepView) -> Sequence[float]:
        return whitened_over_tokens(step, step.reward_N)
