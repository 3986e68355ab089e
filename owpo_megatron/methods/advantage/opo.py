"""OPO: the baseline of least variance for exactly on-policy updates, weighted by the responses' lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.method import StepView


@dataclass(frozen=True)
class Opo(Clipped):
    """R - sum(L R) / sum(L) over the siblings, no standard deviation; as verl's `opo`."""

    name = "opo"
    summary = "S with A = R - Σ L R / Σ L"
    paper = "arXiv:2505.23585"

    def advantages(self, step: StepView) -> Sequence[float]:
        out = [0.0] * len(step.reward_N)
        for group in step.groups:
            tokens = sum(step.length_N[index] for index in group)
            baseline = sum(step.length_N[index] * step.reward_N[index] for index in group) / tokens
            for index in group:
                out[index] = step.reward_N[index] - baseline
        return out
