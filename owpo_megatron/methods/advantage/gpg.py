"""GPG: the policy gradient on centred rewards, scaled up by the share of responses that have one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import PolicyGradient
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.normalise import centred, in_groups


@dataclass(frozen=True)
class Gpg(PolicyGradient):
    """No ratio, no clip, no standard deviation; as verl's `gpg`, with its f_norm 1."""

    name = "gpg"
    summary = "A log π with A = α (R - mean), α = N / #(R ≠ 0)"
    paper = "arXiv:2504.02546"

    def advantages(self, step: StepView) -> Sequence[float]:
        counted = [step.reward_N[index] for group in step.groups for index in group]
        scale = len(counted) / max(sum(reward != 0 for reward in counted), 1)
        return [scale * value for value in in_groups(step, centred)]
