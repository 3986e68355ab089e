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

TWO_RANKS: list[dict[str, Any]] = [
    {"parallel": {"dp": 2}, "dtype": "float32", "few": False},  # every reader, and what happens if it does not wait
    {"parallel": {"cp": 2}, "dtype": "bfloat16", "few": True},
]
FOUR_RANKS: list[dict[str, Any]] = [
    {"parallel": {"pp": 2, "vpp": 2, "dp": 2}, "dtype": "bfloat16", "few": True},
    {"parallel": {"pp": 2, "dp": 2}, "dtype": "float32", "few": True},
    {"parallel": {"tp": 2, "sp": True, "dp": 2}, "dtype": "bfloat16", "few": True},
]
EXPERTS: list[dict[str, Any]] = [{"parallel": {"dp": 4, "ep": 2}, "dtype": "bfloat16", "few": True}]


def check(found: dict[str, Any]) -> None:
    assert found["groups"] > 3, "all parameters are in a few buckets"
    for rank in found["got"]:
        for name in ("all", "held back"):
            assert {"digest", "swapped_logprobs", "metrics", "restarted"} <= set(rank[name])
            assert rank[name] == {key: rank["gradients"][key] for key in rank[name]}, name
    if found["case"]["few"]:
        return
    caught = {name for rank in found["got"] for name in READERS if rank[CARELESS][name] != rank["gradients"][name]}
    assert caught == set(READERS), "a reader would not notice that it did not wait"
    for rank in found["got"]:
        assert rank[CARELESS]["metrics"] == rank["gradients"]["metrics"], "updates wait for themselves"
        assert rank[CARELESS]["restarted"] != rank["gradients"]["restarted"], "what arrives late would overwrite it"


def test_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / "model", tied=True, vocab_size=97)
    for found in ranks.run(2, run_cases, model, tmp_path, TWO_RANKS)[0]:
        check(found)


@pytest.mark.extra
def test_four_ranks(ranks: Ranks, tmp_path: Path) -> None:
    for name, family, cases in (("dense", "qwen3", FOUR_RANKS), ("experts", "qwen3_moe", EXPERTS)):
        model = make_hf_model(tmp_path / name, family)
        for found in ranks.run(4, run_cases, model, tmp_path, cases)[0]:
            check(found)
