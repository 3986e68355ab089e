"""The loss that sampling methods share: PPO's clipped surrogate with mean-centred or normalised advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.methods.clipped import Clipped
from owpo_megatron.methods.method import StepView


@dataclass(frozen=True)
class Sampled(Clipped):
    """min(r A, clip(r) A), summed over tokens, for subclasses with a plan of their own."""

    kind = "sampling"


def minus_mean(step: StepView) -> list[float]:
    """R - mean of the group, over the samples that count; 0 for the others."""
    totals: dict[int, list[float]] = {}
    for reward, counts, group in zip(step.reward_N, step.counts_N, step.group_N, strict=True):
        if counts:
            totals.setdefault(group, []).append(reward)
    mean = {group: sum(rewards) / len(rewards) for group, rewards in totals.items()}
    return [
        reward - mean[group] if counts else 0.0
        for reward, counts, group in zip(step.reward_N, step.counts_N, step.group_N, strict=True)
    ]


def whitened(values: Sequence[float], counts: Sequence[bool]) -> list[float]:
    """Values minus their mean, divided by their population standard deviation + 1e-8, over those that count."""
    inside = [value for value, counted in zip(values, counts, strict=True) if counted]
    if not inside:
        return [0.0] * len(values)
    mean = sum(inside) / len(inside)
    spread = (sum((value - mean) ** 2 for value in inside) / len(inside)) ** 0.5
    return [(value - mean) / (spread + 1e-8) if counted else 0.0 for value, counted in zip(values, counts, strict=True)]
