"""REINFORCE++-baseline: the group's mean as baseline, then whitened over all response tokens of the step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.normalise import centred, in_groups, whitened_over_tokens


@dataclass(frozen=True)
class ReinforcePPBaseline(Clipped):
    """Equal to verl's `reinforce_plus_plus_baseline`."""

    name = "reinforce_pp_baseline"
    summary = "S with A = (R - mean) whitened over the step's tokens"
    paper = "arXiv:2501.03262"

    def advantages(self, step: StepView) -> Sequence[float]:
        return whitened_over_tokens(step, in_groups(step, centred))
