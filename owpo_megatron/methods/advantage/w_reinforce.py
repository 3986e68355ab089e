"""W-REINFORCE and its two parts: learning from right answers alone (PSR) and from wrong ones alone (NSR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import PolicyGradient
from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.normalise import in_groups


@dataclass(frozen=True)
class WReinforce(PolicyGradient):
    """No baseline: λ for right answers, -1 for wrong ones (right: a reward above 0)."""

    name = "w_reinforce"
    summary = "A log π with A = λ for right, -1 for wrong answers"
    paper = "arXiv:2506.01347"

    right: float = hyper(0.1, "Weight λ of right answers.", ge=0)

    def advantages(self, step: StepView) -> Sequence[float]:
        return in_groups(step, lambda rewards: [self.right if reward > 0 else -1.0 for reward in rewards])


@dataclass(frozen=True)
class Psr(PolicyGradient):
    """1 for right answers, 0 for wrong ones, which still count in the divisor."""

    name = "psr"
    summary = "A log π with A = 1 for right, 0 for wrong answers"
    paper = "arXiv:2506.01347"

    def advantages(self, step: StepView) -> Sequence[float]:
        return in_groups(step, lambda rewards: [float(reward > 0) for reward in rewards])


@dataclass(frozen=True)
class Nsr(PolicyGradient):
    """-1 for wrong answers, 0 for right ones, which still count in the divisor: W-REINFORCE with λ = 0."""

    name = "nsr"
    summary = "A log π with A = 0 for right, -1 for wrong answers"
    paper = "arXiv:2506.01347"

    def advantages(self, step: StepView) -> Sequence[float]:
        return in_groups(step, lambda rewards: [0.0 if reward > 0 else -1.0 for reward in rewards])
