"""The loss that sampling methods share: PPO's clipped surrogate with mean-centred or normalised advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from owpo_megatron.methods.hyper import hyper
from owpo_megatron.methods.method import ChunkBatch, Method, StepView, Terms
from owpo_megatron.methods.metrics import policy_metrics
from owpo_megatron.methods.surrogate import clipped_surrogate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Sampled(Method):
    """min(r A, clip(r) A), summed over tokens, for subclasses with a plan of their own."""

    kind = "sampling"

    clip_low: float = hyper(0.2, "Lower clip range of the ratio.", gt=0, lt=1)
    clip_high: float = hyper(0.2, "Upper clip range of the ratio.", gt=0)

    def terms(self, logp_C: torch.Tensor, batch: ChunkBatch) -> Terms:
        surrogate = clipped_surrogate(logp_C, batch, self.clip_low, self.clip_high)
        return Terms(surrogate.value_C, policy_metrics(logp_C, batch, surrogate.ratio_C, surrogate.clipped_C))


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
