"""Metrics of a step's responses: rewards, lengths, verdicts, and what a run's mixture, audit and tools add."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from owpo_megatron.trainer.episodes import episode_facts
from owpo_megatron.trainer.mixture import Mixture
from owpo_megatron.trainer.noise import RewardNoise
from owpo_megatron.trainer.rewards import RewardRules
from owpo_megatron.types import Group, Rollout

OWN = ("policy", "baseline")  # origins of responses that this step drew


def own_rollouts(groups: Sequence[Group]) -> list[Rollout]:
    """Return the responses that this step drew, without those of a pool or of the data."""
    return [rollout for group in groups for rollout in group.rollouts if rollout.origin in OWN]


class RolloutFacts:
    """Fields of a step's line that come from its responses.

    Args:
        rules: what overlong responses lose.
        noise: rewards that are wrong on purpose (`verifier.flip`).
        mixture: sources and domains that get metrics of their own.
        audited: counts of the verifier's audit since the last call (`verifier.audit`).
        tools: metrics of the environments since the last call.
    """

    def __init__(
        self,
        rules: RewardRules,
        noise: RewardNoise,
        mixture: Mixture | None = None,
        audited: Callable[[], dict[str, int]] | None = None,
        tools: Callable[[], dict[str, float]] | None = None,
    ):
        self._rules = rules
        self._noise = noise
        self._mixture = mixture or Mixture()
        self._audited = audited
        self._tools = tools

    def of(self, seen: list[Group], kept: list[Group]) -> dict[str, Any]:
        """Return the fields of a step that drew `seen` and trains on `kept`. Lengths are in tokens."""
        rollouts = own_rollouts(seen)
        reasons = Counter(verdict.reason for group in seen for verdict in group.verdicts)
        return (
            {
                "reward_mean": sum(_own_rewards(seen)) / len(rollouts),
                "groups": len(kept),
                "groups_dropped": len(seen) - len(kept),
                "response_length": sum(rollout.generated_length for rollout in rollouts) / len(rollouts),
                "truncated_share": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
                "tokens_generated": sum(rollout.generated_length for rollout in rollouts),
                "policy_version": min(rollout.spans[0][0] for rollout in rollouts),
                "verifier": dict(sorted(reasons.items())),
            }
            | self._flipped(seen)
            | ({"audit": self._audited()} if self._audited else {})
            | self._overlong(rollouts)
            | episode_facts(rollouts)
            | (self._tools() if self._tools else {})
            | self._mixture.facts(seen)
        )

    def _overlong(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Mean reward that overlong responses lose, over all; no field where none is punished."""
        if not self._rules.overlong_tokens:
            return {}
        return {"overlong_penalty": sum(self._rules.penalty(one.generated_length) for one in rollouts) / len(rollouts)}

    def _flipped(self, seen: list[Group]) -> dict[str, float]:
        """Share of rewards that contradict their verdict; no field where none is meant to."""
        if not self._noise.probability:
            return {}
        pairs = [pair for group in seen for pair in zip(group.rewards, group.verdicts, strict=True)]
        return {"rewards_flipped": sum(reward != verdict.reward for reward, verdict in pairs) / len(pairs)}


def _own_rewards(groups: Sequence[Group]) -> list[float]:
    pairs = [pair for group in groups for pair in zip(group.rollouts, group.rewards, strict=True)]
    return [reward for rollout, reward in pairs if rollout.origin in OWN]
