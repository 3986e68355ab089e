"""Pass@k and its bootstrap interval, against brute force and against an exact distribution."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from owpo_megatron.evaluation.estimate import estimate, pass_at_k, pass_at_k_with_replacement


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples: int) -> None:
    """Brute force over every subset of size k of the samples."""
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
        expected = sum(map(any, subsets)) / len(subsets)
        assert math.isclose(pass_at_k(samples, correct, k), expected, abs_tol=1e-12)


def test_pass_at_k_as_a_product() -> None:
    """The closed form of the paper that introduced it, 1 - prod_{i=n-c+1..n} (1 - k/i), at this project's sizes."""
    for correct in range(33):
        product = math.prod(1 - 16 / i for i in range(32 - correct + 1, 33)) if correct <= 16 else 0.0
        assert pass_at_k(32, correct, 16) == pytest.approx(1 - product, abs=1e-12)


def test_pass_at_1_is_the_mean_accuracy() -> None:
    assert [pass_at_k(8, right, 1) for right in (0, 3, 8)] == [0.0, pytest.approx(3 / 8), 1.0]


def binomial_quantile(count: int, chance: float, level: float) -> int:
    """The smallest x with P(X <= x) >= level."""
    total = 0.0
    for x in range(count + 1):
        total += math.comb(count, x) * chance**x * (1 - chance) ** (count - x)
        if total >= level:
            return x
    return count


def test_the_interval_of_a_known_distribution() -> None:
    """12 of 30 problems right: a resampled mean is exactly Binomial(30, 0.4) / 30, whose quantiles are known."""
    found = estimate([1.0] * 12 + [0.0] * 18)
    low, high = (binomial_quantile(30, 0.4, level) / 30 for level in (0.025, 0.975))
    assert (found.value, found.low, found.high) == (pytest.approx(0.4), pytest.approx(low), pytest.approx(high))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """400 sets of 80 problems, each right with chance 0.35; the percentile bootstrap is a bit narrow at this size."""
    rng = random.Random(5)
    covered = 0
    for _ in range(400):
        found = estimate([float(rng.random() < 0.35) for _ in range(80)], resamples=1000)
        covered += found.low <= 0.35 <= found.high
    assert 0.91 <= covered / 400 <= 0.975


def test_the_interval_is_reproducible_and_has_no_width_without_variation() -> None:
    scores = [0.01 * index * index for index in range(37)]
    assert estimate(scores) == estimate(scores) != estimate(scores, seed=1)
    nothing = estimate([0.0] * 30)
    assert (nothing.value, nothing.low, nothing.high) == (0.0, 0.0, 0.0)


def test_a_large_set_is_resampled_in_parts() -> None:
    """12,032 problems: the width is that of the normal approximation, 2 * 1.96 * sqrt(p (1 - p) / n), within 5 %."""
    found = estimate([1.0] * 6000 + [0.0] * 6032, resamples=2000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 12_032), rel=0.05)


@pytest.mark.parametrize(
    ("correct", "without", "with_"), [(0, 0.0, 0.0), (1, 0.5, 0.398), (4, 0.949, 0.882), (32, 1, 1)]
)
def test_pass_at_16_of_32_with_and_without_replacement(correct: int, without: float, with_: float) -> None:
    """1 - C(32 - c, 16) / C(32, 16) against 1 - (1 - c/32)^16: the paper gives neither; they differ by 0.1."""
    assert pass_at_k(32, correct, 16) == pytest.approx(without, abs=5e-4)
    assert pass_at_k_with_replacement(32, correct, 16) == pytest.approx(with_, abs=5e-4)
