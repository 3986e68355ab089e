"""Every registered method, and coupled ones, through MegatronPolicy.update: several ranks equal one, whatever the
divisor, with ranks that have unequal numbers of microbatches (and so an empty one).

That one rank is right is tests/head/test_seam.py's part (dense float64) and the parity tests'. Not covered: CUDA.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from method_worker import methods, minibatch, plan_of, updates
from rank_pool import Ranks
from tiny import make_hf_model

TOKENS = 13
LR = 1e-3  # tiny.make_config's
LAYOUTS: list[dict[str, int]] = [
    {"dp": 2},
    {"tp": 2},
    {"pp": 2},
    {"pp": 2, "vpp": 2},
    {"cp": 2},
    {"cp": 2, "tp": 2},
    {"cp": 2, "pp": 2},
]


@pytest.fixture(scope="module")
def alone(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    model = make_hf_model(tmp_path_factory.mktemp("method_updates") / "model")
    return model, ranks.run(1, updates, model, {}, 1000)[0]


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_several_ranks_equal_one(
    ranks: Ranks, alone: tuple[Path, list[dict[str, Any]]], parallel: dict[str, int]
) -> None:
    model, expected = alone
    count = math.prod(size for axis, size in parallel.items() if axis != "vpp")
    found = ranks.run(count, updates, model, parallel, TOKENS)[0]
    assert [one["method"] for one in found] == [one["method"] for one in expected] == [m.name for m in methods()]
    for ours, theirs in zip(found, expected, strict=True):
        name = ours["method"]
        assert ours["sums"]["loss_count"] == theirs["sums"]["loss_count"] > 0, name
        assert ours["sums"] == pytest.approx(theirs["sums"], rel=2e-5, abs=1e-6), name
        assert ours["weights"].keys() == theirs["weights"].keys()
        for weight, values in theirs["weights"].items():
            assert ours["weights"][weight] == pytest.approx(values, abs=2e-6), (name, weight)


@pytest.mark.matrix
@pytest.mark.ranks
@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_rounded_moments_on_several_ranks_equal_those_of_one(
    ranks: Ranks, alone: tuple[Path, list[dict[str, Any]]], parallel: dict[str, int]
) -> None:
    """The second update begins with rounded moments. One that sums in another order rounds the other way is off by
    2^-8 of itself, and its parameter by as much of a step; others agree as with moments in float32."""
    model, _ = alone
    count = math.prod(size for axis, size in parallel.items() if axis != "vpp")
    one = ranks.run(1, updates, model, {}, 1000, 2, False, None, "bfloat16")[0]
    found = ranks.run(count, updates, model, parallel, TOKENS, 2, False, None, "bfloat16")[0]
    assert [each["method"] for each in found] == [each["method"] for each in one] == [m.name for m in methods()]
    off = []
    for ours, theirs in zip(found, one, strict=True):
        assert ours["sums"] == pytest.approx(theirs["sums"], rel=2e-5, abs=1e-6), ours["method"]
        for weight, values in theirs["weights"].items():
            assert ours["weights"][weight] == pytest.approx(values, abs=2**-7 * LR), (ours["method"], weight)
            off += [abs(a - b) > 2e-6 for a, b in zip(ours["weights"][weight], values, strict=True)]
    assert sum(off) < 1e-3 * len(off)


@pytest.mark.ranks
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_late_parameters_and_an_offloaded_optimizer_change_no_bit(
    moments: str, ranks: Ranks, alone: tuple[Path, list[dict[str, Any]]]
) -> None:
    """Two updates by each method: the second begins while the parameters of the first arrive, without its moments."""
    model, _ = alone
    plain, late = (
        ranks.run(2, updates, model, {"dp": 2, "overlap": overlap}, TOKENS, 2, offload, None, moments)[0]
        for overlap, offload in (("gradients", False), ("all", True))
    )
    assert [one["method"] for one in plain] == [m.name for m in methods()]
    for ours, theirs in zip(late, plain, strict=True):
        assert ours == theirs, ours["method"]


@pytest.mark.ranks
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_the_same_with_experts(moments: str, ranks: Ranks, tmp_path: Path) -> None:
    """Two optimizers per rank, of dense parameters and of experts."""
    model = make_hf_model(tmp_path / "model", "qwen3_moe", norm_topk_prob=True)
    some = ("owpo", "dapo")
    plain, late = (
        ranks.run(2, updates, model, {"dp": 2, "ep": 2, "overlap": overlap}, 1000, 2, offload, some, moments)[0]
        for overlap, offload in (("gradients", False), ("all", True))
    )
    assert late == plain and len(plain) >= 2


def test_the_ranks_have_unequal_numbers_of_microbatches() -> None:
    """Condition of the case above: the planner pads the shorter rank with empty microbatches."""
    plan = plan_of(minibatch(), 2, TOKENS)
    assert sorted(sum(bool(one) for one in rank) for rank in plan) == [1, 2]
    assert len(plan_of(minibatch(), 1, 1000)[0]) == 1


@pytest.mark.ranks
def test_every_method_moves_its_own_way(alone: tuple[Path, list[dict[str, Any]]]) -> None:
    """A comparison of equal updates would show nothing. Pair by pair: tests/methods/test_all_pairs.py."""
    _, found = alone
    assert len({round(one["squares"], 9) for one in found}) >= len(found) * 2 // 3
    assert all(one["sums"]["grad_norm"] > 1e-3 for one in found)
