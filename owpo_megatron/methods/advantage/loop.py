"""LOOP: the leave-one-out baseline of RLOO with PPO's clip, for several updates per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.advantage.rloo import leave_one_out
from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.normalise import in_groups


@dataclass(frozen=True)
class Loop(Clipped):
    """RLOO's advantage in the clipped surrogate; verl's `rloo` estimator with its standard loss is this."""

    name = "loop"
    summary = "S with A = R - mean of the other siblings"
    paper = "arXiv:2502.01600; for diffusion arXiv:2503.00897"

    def advantages(self, step: StepView) -> Sequence[float]:
        return in_groups(step, leave_one_out)
