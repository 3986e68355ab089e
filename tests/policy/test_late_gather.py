"""`parallel.overlap: all`: parameters that arrive during the next update's forward change no bit of a run.

Covered: every reader of weights right after an update, and updates that follow each other; swaps, checkpoints, a
restart from the reference; data and context parallelism, interleaved stages, experts; buckets smaller than a layer. A
reader that does not wait is caught. Not covered: CUDA's streams, Transformer Engine's modules, a real network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from late_gather_worker import CARELESS, READERS, run_cases
from rank_pool import Ranks
from tiny import make_hf_model

FEW = {"readers": ["digest", "swapped_logprobs"], "runs": ["all", "held back"]}
TWO_RANKS: list[dict[str, Any]] = [
    {
        "parallel": {"dp": 2},
        "dtype": "float32",
        "readers": [name for name in READERS if name != "checkpoint"],
        "runs": ["held back", CARELESS],
    },
    {"parallel": {"dp": 2}, "dtype": "float32", **FEW},
    {"parallel": {"cp": 2}, "dtype": "bfloat16", **FEW},
]
FOUR_RANKS: list[dict[str, Any]] = [
    {"parallel": {"pp": 2, "vpp": 2, "dp": 2}, "dtype": "bfloat16", **FEW},
    {"parallel": {"pp": 2, "dp": 2}, "dtype": "float32", "readers": READERS, "runs": ["all", CARELESS]},
    {"parallel": {"tp": 2, "sp": True, "dp": 2}, "dtype": "bfloat16", **FEW},
]
EXPERTS: list[dict[str, Any]] = [{"parallel": {"dp": 4, "ep": 2}, "dtype": "bfloat16", **FEW}]


def check(found: dict[str, Any]) -> None:
    """`held back`: parameters arrive when somebody waits; careless: the same, and nobody but the updates waits."""
    assert found["groups"] > 2, "all parameters are in one bucket"
    case = found["case"]
    for rank in found["got"]:
        assert {*case["readers"], "metrics", "restarted"} == set(rank["gradients"])
        for name in set(case["runs"]) - {CARELESS}:
            assert rank[name] == rank["gradients"], name
    if CARELESS not in case["runs"]:
        return
    pairs = [(rank[CARELESS], rank["gradients"]) for rank in found["got"]]
    for name in case["readers"]:
        assert any(careless[name] != right[name] for careless, right in pairs), f"{name} would not notice"
    for careless, right in pairs:
        assert careless["metrics"] == right["metrics"], "updates wait for themselves"
        assert careless["restarted"] != right["restarted"], "what arrives late would overwrite it"


def test_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / "model", tied=True, vocab_size=97)
    for found in ranks.run(2, run_cases, model, tmp_path, TWO_RANKS)[0]:
        check(found)


@pytest.mark.parametrize(
    ("family", "cases"),
    [
        pytest.param("qwen3", FOUR_RANKS, marks=pytest.mark.matrix, id="dense"),
        pytest.param("qwen3_moe", EXPERTS, marks=pytest.mark.extra, id="experts"),
    ],
)
def test_four_ranks(family: str, cases: list[dict[str, Any]], ranks: Ranks, tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / "model", family)
    for found in ranks.run(4, run_cases, model, tmp_path, cases)[0]:
        check(found)
