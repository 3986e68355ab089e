"""Metrics of a step's responses by the source and the domain of their prompts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from owpo_megatron.types import Group, Prompt


@dataclass(frozen=True)
class Mixture:
    """Names what a run's prompts are mixed of; reports nothing where that is one thing.

    Args:
        sources: names of `data.sources`, in their order.
        domains: the domains of all prompts.
    """

    sources: Sequence[str] = ()
    domains: Collection[str] = ()

    def facts(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Return {"sources": {name: metrics}, "domains": {name: metrics}}; one without responses is missing.

        Example:
            {"sources": {"gsm8k": {"reward_mean": 0.5, "responses": 64, "response_length": 210.0}, ...}}
        """
        facts: dict[str, Any] = {}
        if len(self.sources) > 1:
            facts["sources"] = _by(groups, lambda prompt: self.sources[prompt.source])
        if len(self.domains) > 1:
            facts["domains"] = _by(groups, lambda prompt: prompt.domain)
        return facts


def _by(groups: Sequence[Group], name_of: Callable[[Prompt], str]) -> dict[str, dict[str, float]]:
    parts: dict[str, list[Group]] = {}
    for group in groups:
        parts.setdefault(name_of(group.rollouts[0].prompt), []).append(group)
    return {name: _metrics(parts[name]) for name in sorted(parts)}


def _metrics(groups: Sequence[Group]) -> dict[str, float]:
    rewards = [reward for group in groups for reward in group.rewards]
    lengths = [rollout.generated_length for group in groups for rollout in group.rollouts]
    return {
        "reward_mean": sum(rewards) / len(rewards),
        "responses": len(rewards),
        "response_length": sum(lengths) / len(lengths),
    }
