"""MaxRL: the group's mean as divisor, an unbiased step towards maximum likelihood of the right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.normalise import centred, in_groups


@dataclass(frozen=True)
class MaxRl(Clipped):
    """(R - mean) / mean; rare successes weigh more than with the standard deviation. As prime-rl's `max_rl`."""

    name = "maxrl"
    summary = "S with A = (R - mean) / mean, 0 where mean ≤ 0"
    paper = "arXiv:2602.02710"

    def advantages(self, step: StepView) -> Sequence[float]:
        return in_groups(step, over_mean)


def over_mean(rewards: Sequence[float]) -> list[float]:
    """(R - mean) / mean, or zeros.

    Example:
        >>> over_mean([1.0, 0.0, 0.0, 0.0])
        [3.0, -1.0, -1.0, -1.0]
    """
    mean = sum(rewards) / len(rewards)
    return [one / mean for one in centred(rewards)] if mean > 0 else [0.0] * len(rewards)
