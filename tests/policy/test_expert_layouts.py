"""Slots, checkpoints and exports where experts are spread over tensor-parallel ranks (parallel.etp 1).

Their parameters have buffers, and an optimizer, of their own. Covered: two ranks, swaps and resumes bit by bit, and
that a run whose experts have none is refused. Not covered: etp between 1 and tp, which gloo cannot do; CUDA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpoint_worker import run_cases, start
from rank_pool import Ranks
from swap_worker import run_cases as swap_cases
from tiny import make_hf_model

from owpo_megatron.errors import UserError

LAYOUT: dict[str, Any] = {"tp": 2, "sp": True, "etp": 1, "ep": 2}
CASE: dict[str, Any] = {"parallel": LAYOUT, "dtype": "float32", "aliased": False, "loaded": False}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("expert_models")
    fields: dict[str, Any] = {"family": "qwen3_moe", "norm_topk_prob": True, "num_hidden_layers": 2}
    return make_hf_model(root / "model", **fields), make_hf_model(root / "other", seed=1, **fields)


def failed(found: list[dict[str, Any]]) -> list[str]:
    return [name for one in found for name, held in one["held"].items() if not held]


@pytest.mark.extra
def test_swaps(ranks: Ranks, models: tuple[Path, Path], tmp_path: Path) -> None:
    case = {"parallel": LAYOUT, "dtype": "bfloat16", "placement": "resident"}
    found = ranks.run(2, swap_cases, *models, tmp_path, [case])[0]
    assert len(found[0]["held"]) > 10 and failed(found) == []


def test_checkpoint(ranks: Ranks, models: tuple[Path, Path], tmp_path: Path) -> None:
    """The same bits on the same ranks; a run without ep, whose experts have no optimizer of their own, is refused."""
    saved = ranks.run(2, run_cases, "save", *models, tmp_path, [CASE])[0]
    resumed = ranks.run(2, run_cases, "load", *models, tmp_path, [CASE])[0]
    assert failed(saved + resumed) == []
    policy, _ = start(CASE | {"parallel": {}}, *models)
    with pytest.raises(UserError, match=r"parallel.ep = 1: .*/0/state was saved with parallel.ep above 1, and"):
        policy.restore(tmp_path / "0" / "state", False)
    policy.load_state(tmp_path / "0" / "state")  # the weights alone
