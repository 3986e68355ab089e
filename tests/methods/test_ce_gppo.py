"""CE-GPPO by hand, and as a special case: without the gradients that it keeps, PPO's surrogate with a dual clip."""

from __future__ import annotations

import pytest
from evaluated import of_ratio

from owpo_megatron.methods import make_method


def test_each_side_of_the_range_by_hand() -> None:
    method = make_method("ce_gppo")  # [0.8, 1.2], β1 = 0.75, β2 = 1
    for ratio, advantage, weight in (
        (1.1, 2.0, 1.1), (1.5, 2.0, 1.2), (0.5, 2.0, 0.5),  # A > 0: kept at 1.2 above, r below
        (0.9, -2.0, 0.9), (0.5, -2.0, 0.6), (1.5, -2.0, 1.5),  # A < 0: 0.75 · 0.8 below, r above
    ):  # fmt: skip
        assert of_ratio(method, ratio, advantage) == pytest.approx((weight * advantage,) * 2), (ratio, advantage)
    assert of_ratio(method, 12.0, -2.0) == pytest.approx((-20.0, 0.0))


@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.1, 1.5, 12.0])
@pytest.mark.parametrize("advantage", [1.5, -0.5])
def test_without_what_it_keeps_its_gradient_is_the_dual_clips(ratio: float, advantage: float) -> None:
    method = make_method("ce_gppo", below=0.0, above=0.0)
    dual = make_method("dual_clip", cap=10.0)
    assert of_ratio(method, ratio, advantage)[1] == pytest.approx(of_ratio(dual, ratio, advantage)[1])
