"""DCPO: clip bounds that widen for improbable tokens, and advantages smoothed over a prompt's visits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, StepView, Terms
from owpo_megatron.methods.metrics import policy_metrics
from owpo_megatron.methods.normalise import z_scores

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dcpo(Method):
    """min(r A, clip(r) A) with bounds that depend on the token's old probability q, and a cap for A < 0.

    low = (1 + sqrt(max(0, 1 - 4 ε_low / q))) / 2, high = min((1 + sqrt(1 + 4 ε_high / q)) / 2, 10). ε as in the
    authors' run script. The mean over a response's tokens, then over responses, where they sum over responses.
    """

    name = "dcpo"
    summary = "S with bounds (1 ± sqrt(1 ± 4 ε / π_old)) / 2"
    paper = "arXiv:2509.02333"
    divisor = "samples"

    epsilon_low: float = hyper(0.2, "ε of the lower bound.", gt=0)
    epsilon_high: float = hyper(0.28, "ε of the upper bound.", gt=0)
    cap: float = hyper(10.0, "Largest ratio: of the upper bound, and of tokens with A < 0.", gt=1)

    def bounds(self, old_logp_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(low, high) of the ratio for tokens of these old log-probs."""
        inverse_C = (-old_logp_C).exp()
        low_C = (1 + (1 - 4 * self.epsilon_low * inverse_C).clamp(min=0).sqrt()) / 2
        high_C = ((1 + (1 + 4 * self.epsilon_high * inverse_C).sqrt()) / 2).clamp(max=self.cap)
        return low_C, high_C

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        advantage_C, (low_C, high_C) = batch.advantage_C, self.bounds(batch.old_logp_C)
        ratio_C = (logp_C - batch.old_logp_C).exp()
        value_C = (ratio_C * advantage_C).minimum(ratio_C.clamp(low_C, high_C) * advantage_C)
        value_C = value_C.maximum(self.cap * advantage_C).where(advantage_C < 0, value_C)
        ratio_C = ratio_C.detach()
        too_low_C = ((ratio_C < low_C) | (ratio_C > self.cap)) & (advantage_C < 0)
        cut_C = (ratio_C > high_C) & (advantage_C > 0) | too_low_C
        return Terms(value_C, policy_metrics(logp_C, batch, ratio_C, cut_C))


@dataclass(frozen=True)
class DcpoSmooth(Dcpo):
    """The same with the advantage that changes less over a prompt's visits: no group of equal verdicts is wasted.

    At a prompt's n-th visit A_new is the z-score in this group, A_all that with mean and std of the prompt's rewards in
    all visits; of A_all / n + (1 - 1/n) A_new and A_new / n + (1 - 1/n) A_all the smaller in size is taken. Number,
    mean and squared deviations of each prompt's rewards are kept in checkpoints.
    """

    name = "dcpo_smooth"
    summary = "as dcpo, A smoothed over the prompt's earlier visits"

    def advantages(self, step: StepView) -> Sequence[float]:
        out = [0.0] * len(step.reward_N)
        for group in step.groups:
            rewards = [step.reward_N[index] for index in group]
            kept = step.memory.get(step.prompt_N[group[0]], [0, 0, 0.0, 0.0])
            visits, count, mean, squares = step.memory[step.prompt_N[group[0]]] = _visited(kept, rewards)
            std = (squares / max(count - 1, 1)) ** 0.5
            for index, new in zip(group, z_scores(rewards), strict=True):
                over_all = (step.reward_N[index] - mean) / (std + 1e-6) if squares > 0 else 0.0
                one, other = over_all / visits + (1 - 1 / visits) * new, new / visits + (1 - 1 / visits) * over_all
                out[index] = min(one, other, key=abs)
        return out


def _visited(kept: Sequence[float], rewards: Sequence[float]) -> list[float]:
    """[visits, rewards, their mean, their squared deviations] with one more group, between-groups term included."""
    visits, count, mean, squares = kept
    own = sum(rewards) / len(rewards)
    total = count + len(rewards)
    squares += sum((reward - own) ** 2 for reward in rewards) + (own - mean) ** 2 * count * len(rewards) / total
    return [visits + 1, total, mean + (own - mean) * len(rewards) / total, squares]
