"""RLOO: REINFORCE with the mean of the other siblings as baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import PolicyGradient
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.normalise import in_groups


@dataclass(frozen=True)
class Rloo(PolicyGradient):
    """R - mean of the others = G / (G - 1) (R - mean); no ratio, no clip, as in the paper. PPO's clip: `loop`."""

    name = "rloo"
    summary = "A log π with A = R - mean of the other siblings"
    paper = "arXiv:2402.14740"

    def advantages(self, step: StepView) -> Sequence[float]:
        return in_groups(step, leave_one_out)


def leave_one_out(rewards: Sequence[float]) -> list[float]:
    """Each reward minus the mean of the other ones; 0 for a single one.

    Example:
        >>> [round(one, 3) for one in leave_one_out([1.0, 0.0, 0.0, 0.0])]
        [1.0, -0.333, -0.333, -0.333]
    """
    total, others = sum(rewards), len(rewards) - 1
    return [reward - (total - reward) / others if others else 0.0 for reward in rewards]
