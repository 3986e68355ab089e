"""Metrics of a step's episodes: turns, calls of tools, what was observed, and why they ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from owpo_megatron.types import Rollout


def episode_facts(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Metrics of the responses that have turns; no field where none has.

    Returns:
        turns, tool_calls: means per episode; tool_errors: share of the calls; observation_tokens: sum; episodes_ended:
        number of episodes by the reason for which they ended.
    """
    episodes = [rollout.episode for rollout in rollouts if rollout.episode is not None]
    if not episodes:
        return {}
    observed = [span for episode in episodes for span in episode.spans if not span.generated]
    calls = sum(span.calls for span in observed)
    return {
        "turns": sum(len(episode.turns) for episode in episodes) / len(episodes),
        "tool_calls": calls / len(episodes),
        "tool_errors": sum(span.errors for span in observed) / max(calls, 1),
        "observation_tokens": sum(span.length for span in observed),
        "episodes_ended": dict(sorted(Counter(episode.ended for episode in episodes).items())),
    }
