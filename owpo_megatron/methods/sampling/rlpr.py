"""RLPR: the reward is the probability that the policy gives the reference answer after its own reasoning."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.plan import PlanView, first_groups
from owpo_megatron.methods.sampling.base import Sampled
from owpo_megatron.types import Group


@dataclass(frozen=True)
class Rlpr(Sampled):
    """R = max(p - p0, 0): p the mean probability of the reference answer's tokens in place of the response's answer, p0
    the same without the reasoning; 0 for a response without an answer. Groups whose standard deviation of R is below
    `beta` times its moving average over the steps are dropped. GRPO's advantages, clip 0.2 / 0.27, token mean; the
    verifier's verdict stays in the metrics and rewards nothing. The probabilities are the trainer's, of the policy that
    sampled. Source: the authors' code and its run for Qwen (OpenBMB/RLPR), without their KL and repetition penalty."""

    name = "rlpr"
    summary = "S with R = probability of the reference answer after the reasoning, minus that without it"
    paper = "arXiv:2506.18254"
    needs_answers = True
    takes_episodes = False

    clip_high: float = hyper(0.27, "Upper clip range of the ratio.", gt=0)
    beta: float = hyper(0.5, "Share of the mean spread below which a group is dropped; 0: none is.", ge=0)
    decay: float = hyper(0.99, "Decay of the moving average of the spread, per step.", ge=0, lt=1)

    def keep(self, view: PlanView) -> Sequence[Group]:
        groups = self.judged(view, first_groups(view))
        spreads = [_spread(group.rewards) for group in groups]
        mean = view.memory.get("spread")
        kept = [one for one, spread in zip(groups, spreads, strict=True) if spread >= self.beta * (mean or 0.0)]
        if spreads:
            now = sum(spreads) / len(spreads)
            view.memory["spread"] = now if mean is None else self.decay * mean + (1 - self.decay) * now
        return kept

    def judged(self, view: PlanView, groups: Sequence[Group]) -> list[Group]:
        """The groups with the probabilities as rewards."""
        assert view.solutions is not None
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        probes = [view.solutions.answered(rollout) for rollout in rollouts]
        pairs = [probe for pair in probes if pair is not None for probe in pair]
        found = iter([_probability(look.logp_L) for look in view.statistics(pairs)])
        rewards = iter([0.0 if pair is None else max(next(found) - next(found), 0.0) for pair in probes])
        return [replace(group, rewards=tuple(next(rewards) for _ in group.rollouts)) for group in groups]


def _probability(logp_L: Sequence[float]) -> float:
    return sum(map(math.exp, logp_L)) / max(len(logp_L), 1)


def _spread(rewards: Sequence[float]) -> float:
    """Standard deviation (n - 1) of a group's rewards."""
    mean = sum(rewards) / len(rewards)
    return math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / max(len(rewards) - 1, 1))
