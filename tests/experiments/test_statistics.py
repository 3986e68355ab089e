"""Means, intervals and areas, against numbers worked out by hand or read off Student's printed table."""

from __future__ import annotations

import math

import pytest

from owpo_megatron.experiments.outcome import area
from owpo_megatron.experiments.protocols import best_of_stages
from owpo_megatron.experiments.statistics import mean_interval, paired_difference, student_quantile


@pytest.mark.parametrize(
    ("freedom", "printed"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)]
)
def test_quantiles_are_those_of_the_printed_table(freedom: int, printed: float) -> None:
    assert student_quantile(freedom) == pytest.approx(printed, abs=6e-4)


def test_interval_of_three_values() -> None:
    # mean 2, sd 1, so half the width is t(2) / sqrt(3) = 4.3027 / 1.7321 = 2.4842
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)


def test_a_single_value_has_no_interval() -> None:
    assert (mean_interval([0.4]).low, mean_interval([0.4]).high) == (None, None)


def test_pairs_are_by_seed_and_only_of_seeds_that_both_have() -> None:
    found = paired_difference({1: 0.5, 2: 0.7, 3: 0.9}, {2: 0.6, 1: 0.3, 4: 0.0})  # differences 0.2 and 0.1
    assert found is not None and found.count == 2
    assert found.mean == pytest.approx(0.15)
    assert paired_difference({1: 0.5}, {2: 0.5}) is None


def test_pairing_removes_what_the_seeds_share() -> None:
    ours, theirs = {1: 0.9, 2: 0.5, 3: 0.1}, {1: 0.8, 2: 0.4, 3: 0.0}
    found = paired_difference(ours, theirs)
    assert found is not None and found.low is not None and found.low > 0.099
    assert mean_interval(list(ours.values())).low < 0  # type: ignore[operator]


def test_area_is_the_mean_height() -> None:
    assert area(((0, 0.0), (10, 1.0), (30, 1.0))) == pytest.approx((10 * 0.5 + 20) / 30)
    assert area(((0, 0.4), (7, 0.4))) == pytest.approx(0.4)


def test_best_of_stages_counts_an_evaluation_to_the_stage_that_it_ends() -> None:
    curve = [[0, 0.9], [5, 0.3], [10, 0.2], [15, 0.4], [20, 0.5], [25, 0.1]]
    assert best_of_stages(curve, 10) == [0.3, 0.5, 0.1]
