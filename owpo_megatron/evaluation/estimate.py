"""Pass@k per problem, and its mean over problems with a bootstrap interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

RESAMPLES = 10_000
LEVEL = 0.95
_DRAWN_AT_ONCE = 4_000_000  # problems; limits the memory of resampling a large set


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the unbiased estimate of the probability that one of k samples is right: 1 - C(n - c, k) / C(n, k).

    For k = 1 it is the fraction of right samples, so its mean over problems is the mean accuracy (Average@n).

    Source: Chen et al. 2021 (arXiv:2107.03374), Eq. 1.

    Example:
        >>> pass_at_k(samples=4, correct=1, k=2)  # 1 - C(3, 2) / C(4, 2) = 1 - 3/6
        0.5
    """
    assert 0 < k <= samples and 0 <= correct <= samples
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def pass_at_k_with_replacement(samples: int, correct: int, k: int) -> float:
    """Return the plug-in estimate 1 - (1 - c / n)^k: k of the n samples drawn with replacement, as a bootstrap does.

    It is biased downwards where c is small (n = 32, k = 16, c = 1: 0.398 against 0.5).

    Example:
        >>> pass_at_k_with_replacement(samples=4, correct=1, k=2)  # 1 - (3/4)^2
        0.4375
    """
    assert 0 < k <= samples and 0 <= correct <= samples
    return 1.0 - (1.0 - correct / samples) ** k


ESTIMATORS = {"unbiased": pass_at_k, "bootstrap": pass_at_k_with_replacement}


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its interval.

    Example:
        Estimate(value=0.372, low=0.231, high=0.519)
    """

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def estimate(scores: Sequence[float], seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Estimate:
    """Return the mean of per-problem scores with a percentile bootstrap interval over problems.

    All problems are resampled with replacement `resamples` times; the interval lies between the (1 - level) / 2
    quantiles of the resampled means. It measures how the score varies over sets of such problems, including the noise
    of sampling, which every problem contributes. When all scores are equal its width is zero: for n problems without a
    single right answer, 3 / n is the usual upper bound.

    Args:
        scores: one per problem, at least one.
        seed: seed of the resampling; the same scores and seed give the same interval.

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    import numpy as np

    values = np.asarray(scores, dtype=np.float64)
    count = len(values)
    assert count > 0
    rng = np.random.default_rng(seed)
    at_once = max(1, min(resamples, _DRAWN_AT_ONCE // count))
    means = np.concatenate(
        [
            values[rng.integers(0, count, size=(min(at_once, resamples - start), count))].mean(axis=1)
            for start in range(0, resamples, at_once)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high))
