"""Optimizer state with gradients in several buckets, saved and loaded: megatron-core 0.16.1 alone mixes it up.

With padded buckets in one process, and on two ranks with an embedding that both stages share. Not covered: CUDA.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from rank_pool import Ranks
from saved_buckets_worker import resumed_beside
from tiny import make_hf_model

from owpo_megatron.mcore import optimizer


@pytest.mark.process
def test_small_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded with the same buckets: the same bits; with one bucket: the same numbers."""
    config = partial(DistributedDataParallelConfig, bucket_size=5000)
    monkeypatch.setattr(optimizer, "DistributedDataParallelConfig", config)
    found = resumed_beside(make_hf_model(tmp_path / "model", vocab_size=97), tmp_path, {"overlap": "gradients"})
    check(found)
    assert found["gaps"] > 0


def test_shared_embedding(ranks: Ranks, tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / "model", tied=True, vocab_size=97, num_hidden_layers=2, intermediate_size=84)
    found = ranks.run(2, resumed_beside, model, tmp_path, {"pp": 2})
    assert sum(rank["gaps"] for rank in found) > 0
    for rank in found:
        check(rank)


def check(found: dict[str, Any]) -> None:
    assert found["buckets"] > 1 or not found["gaps"]
    assert found["again"] == 0 and found["one bucket"] < 1e-6, found
