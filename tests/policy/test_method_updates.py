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
