"""PGFC: weights of the policy gradient that point the right way under a noisy verifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import PolicyGradient
from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.normalise import in_groups


@dataclass(frozen=True)
class Pgfc(PolicyGradient):
    """The forward correction: expected weight 0 for right answers, -(1 - ρ0 - ρ1) for wrong ones; needs ρ1 alone."""

    name = "pgfc"
    summary = "A log π with A = ρ1 for accepted, ρ1 - 1 for rejected answers"
    paper = "arXiv:2510.00915"

    false_negative: float = hyper(0.1, "Probability ρ1 that the verifier rejects a right answer.", ge=0, lt=1)

    def advantages(self, step: StepView) -> Sequence[float]:
        accepted = self.false_negative
        return in_groups(step, lambda rewards: [accepted if reward > 0 else accepted - 1 for reward in rewards])
