"""Means with Student's 95 % intervals, for values that are paired by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class MeanInterval:
    """A mean and its 95 % interval, which is None for a single value."""

    mean: float
    low: float | None
    high: float | None
    count: int


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """Return the mean of independent values with Student's t interval.

    Example:
        >>> mean_interval([1.0, 2.0, 3.0])  # mean 2, sd 1, t(2 df) = 4.303: 2 -+ 4.303 / sqrt(3)
        MeanInterval(mean=2.0, low=-0.4841..., high=4.4841..., count=3)
    """
    count = len(values)
    assert count
    mean = sum(values) / count
    if count == 1:
        return MeanInterval(mean, None, None, count)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = student_quantile(count - 1) * math.sqrt(variance / count)
    return MeanInterval(mean, mean - half, mean + half, count)


def paired_difference(ours: dict[int, float], others: dict[int, float]) -> MeanInterval | None:
    """Return the mean of ours - others over their common seeds; None if there are none."""
    seeds = sorted(ours.keys() & others.keys())
    return mean_interval([ours[seed] - others[seed] for seed in seeds]) if seeds else None


@cache
def student_quantile(freedom: int, level: float = 0.975) -> float:
    """Return the `level` quantile (> 0.5) of Student's distribution with `freedom` degrees of freedom."""
    low, high = 0.0, 1.0
    while _student_mass(high, freedom) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_mass(middle, freedom) < level else (low, middle)
    return high


def _student_mass(t: float, freedom: int) -> float:
    """Return P(T < t), by Simpson's rule.

    The density, with t = sqrt(freedom) tan(theta), is cos(theta)^(freedom - 1) up to a constant; it is integrated over
    theta in [0, atan(t / sqrt(freedom))].
    """
    intervals = 2000
    width = math.atan(t / math.sqrt(freedom)) / intervals
    total = sum(
        (1 if index in (0, intervals) else 4 if index % 2 else 2) * math.cos(index * width) ** (freedom - 1)
        for index in range(intervals + 1)
    )
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 0.5 + constant * total * width / 3
