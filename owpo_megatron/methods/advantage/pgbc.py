"""PGBC: rewards of a noisy verifier, corrected to those that a perfect one would give on average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.normalise import centred, in_groups


@dataclass(frozen=True)
class Pgbc(Clipped):
    """The backward correction. Its expectation is the true reward, for 0 and 1 alike.

    Without a division by the standard deviation, which would cancel it: (R - ρ0) / c is an affine function of R.
    `reward.false_positive` and `reward.false_negative` correct the verdict in the same way, for any method: use one.
    """

    name = "pgbc"
    summary = "S with A = (R - ρ0) / (1 - ρ0 - ρ1), minus the group's mean"
    paper = "arXiv:2510.00915"

    false_positive: float = hyper(0.1, "Probability ρ0 that the verifier accepts a wrong answer.", ge=0, lt=1)
    false_negative: float = hyper(0.1, "Probability ρ1 that the verifier rejects a right answer.", ge=0, lt=1)

    def advantages(self, step: StepView) -> Sequence[float]:
        trust = 1 - self.false_positive - self.false_negative
        return [value / trust for value in in_groups(step, centred)]
