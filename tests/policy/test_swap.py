"""Hard swaps of the reference without a copy, and to the best of a stage, against runs that copy: the same bits.

Covered: data, tensor and interleaved pipeline parallelism over two ranks, fp32 and bf16, resident and offloaded.
Not covered: CUDA, experts, gathers under way (test_late_gather.py); that no gradient flows through w: methods' tests.
"""

from __future__ import annotations

from typing import Any

import pytest
from rank_pool import Ranks
from swap_worker import run_cases
from tiny import make_hf_model

# "best": also swaps to the best of a stage. "loaded": also starting with another model's weights as the reference, and
# what is refused.
CASES: list[dict[str, Any]] = [
    {"parallel": {"dp": 2}, "dtype": "float32", "placement": "resident", "loaded": True, "best": True},
    {"parallel": {"dp": 2}, "dtype": "bfloat16", "placement": "resident"},
    {"parallel": {"tp": 2}, "dtype": "float32", "placement": "resident"},
    {"parallel": {"tp": 2}, "dtype": "bfloat16", "placement": "resident", "loaded": True, "best": True},
    {"parallel": {"pp": 2, "vpp": 2}, "dtype": "float32", "placement": "resident", "best": True},
    {"parallel": {"dp": 2}, "dtype": "float32", "placement": "offloaded"},
    {"parallel": {"cp": 2}, "dtype": "bfloat16", "placement": "resident", "best": True},
    {"parallel": {"tp": 2}, "dtype": "bfloat16", "placement": "offloaded", "best": True},
]


@pytest.fixture(scope="module")
def results(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Checks that held in each case, on both ranks; one job for all."""
    root = tmp_path_factory.mktemp("swap")
    model = make_hf_model(root / "model", vocab_size=97, tied=True)
    other = make_hf_model(root / "other", vocab_size=97, tied=True, seed=1)
    return ranks.run(2, run_cases, model, other, root / "saved", CASES)[0]


def name_of(case: dict[str, Any]) -> str:
    layout = "x".join(f"{axis}{size}" for axis, size in case["parallel"].items())
    return f"{layout}-{case['dtype']}-{case['placement']}"


@pytest.mark.parametrize("index", range(len(CASES)), ids=[name_of(case) for case in CASES])
def test_swap(index: int, results: list[dict[str, Any]]) -> None:
    """Every comparison is bitwise, and its name is the compared thing; see swap_worker.py."""
    found = results[index]
    assert found["case"] == CASES[index]
    assert len(found["held"]) > 10
    assert [name for name, held in found["held"].items() if not held] == []
