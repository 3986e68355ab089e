"""Dr.GRPO: GRPO without the two divisions that favour short wrong answers and easy prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.normalise import centred, in_groups


@dataclass(frozen=True)
class DrGrpo(Clipped):
    """R - mean of the group; the sum over tokens is divided by the constant L_max, not by the response's length.

    L_max is `rollout.max_response_tokens`, as in TRL's `dr_grpo`. It is part of A, since S grows in proportion to A."""

    name = "dr_grpo"
    summary = "S with A = (R - mean) / L_max, summed over tokens"
    paper = "arXiv:2503.20783"
    divisor = "sample_sums"

    def advantages(self, step: StepView) -> Sequence[float]:
        return [value / step.max_length for value in in_groups(step, centred)]
