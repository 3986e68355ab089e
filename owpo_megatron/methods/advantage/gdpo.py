"""GDPO: every part of the reward is normalised in its group before the parts are added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.method import StepView
from owpo_megatron.methods.normalise import in_groups, whitened_over_tokens, z_scores


@dataclass(frozen=True)
class Gdpo(Clipped):
    """Weighted sum of the parts' z-scores, whitened over the step's tokens; as verl's `gdpo`.

    The parts are those of `reward.weights`, the verdict with weight 1 unless set; `reward.gate` and the overlong
    penalty, which act on sums, have no effect.
    """

    name = "gdpo"
    summary = "S with A = Σ w z(part), whitened over the step's tokens"
    paper = "arXiv:2601.05242"

    def advantages(self, step: StepView) -> Sequence[float]:
        total = [0.0] * len(step.reward_N)
        for name, value_N in (step.part_N or {"verdict": step.reward_N}).items():
            scores = in_groups(replace(step, reward_N=value_N), z_scores)
            total = [so_far + step.weights[name] * score for so_far, score in zip(total, scores, strict=True)]
        return whitened_over_tokens(step, total)
