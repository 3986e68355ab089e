"""Pass@k as the reward of a group: the best sibling alone is reinforced, by what it adds to the second best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.normalise import in_groups, z_scores


@dataclass(frozen=True)
class GrpoPassK(Clipped):
    """Every other sibling gets 0; as verl's `grpo_passk`. Ties: the lower submission index is the best, and A is 0."""

    name = "grpo_passk"
    summary = "S with A = (best - second best) / std for the best"
    paper = "arXiv:2503.19595"

    def advantages(self, step: StepView) -> Sequence[float]:
        return in_groups(step, only_the_best)


def only_the_best(rewards: Sequence[float]) -> list[float]:
    """(best - second best) / (unbiased std + 1e-6) in the best one's place.

    Example:
        >>> [round(one, 3) for one in only_the_best([1.0, 0.0, 0.0, 0.0])]
        [2.0, 0.0, 0.0, 0.0]
    """
    scores = z_scores(rewards)
    best = scores.index(max(scores))
    runner_up = max(scores[:best] + scores[best + 1 :], default=scores[best])
    return [scores[best] - runner_up if index == best else 0.0 for index in range(len(scores))]
