"""Means with Student's 95 % intervals, of values that are paired by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; of a single value there is no interval (None)."""

    mean: float
    low: float | None
    high: float | None
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent values, with the interval of Student's t.

    Example:
        >>> estimate([1.0, 2.0, 3.0])  # mean 2, sd 1, t(2 df) = 4.303: 2 -+ 4.303 / sqrt(3)
        Estimate(mean=2.0, low=-0.4841..., high=4.4841..., count=3)
    """
    count = len(values)
    assert count
    mean = sum(values) / count
    if count == 1:
        return Estimate(mean, None, None, count)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = student_quantile(count - 1) * math.sqrt(variance / count)
    return Estimate(mean, mean - half, mean + half, count)


def paired_difference(ours: dict[int, float], others: dict[int, float]) -> Estimate | None:
    """Mean of ours - others over the seeds that both have; None where there are none."""
    seeds = sorted(ours.keys() & others.keys())
    return estimate([ours[seed] - others[seed] for seed in seeds]) if seeds else None


@cache
def student_quantile(freedom: int, level: float = 0.975) -> float:
    """The t below which Student's distribution with `freedom` degrees has `level` of its mass (level > 0.5)."""
    low, high = 0.0, 1.0
    while _student_mass(high, freedom) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_mass(middle, freedom) < level else (low, middle)
    return high


def _student_mass(t: float, freedom: int) -> float:
    """P(T < t): the density integrated over theta in [0, atan(t / sqrt(freedom))], where it is cos(theta)^(freedom - 1)
    up to a constant, by Simpson's rule."""
    intervals = 2000
    width = math.atan(t / math.sqrt(freedom)) / intervals
    total = sum(
        (1 if index in (0, intervals) else 4 if index % 2 else 2) * math.cos(index * width) ** (freedom - 1)
        for index in range(intervals + 1)
    )
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 0.5 + constant * total * width / 3
