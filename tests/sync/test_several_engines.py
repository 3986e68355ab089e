"""A trainer on two ranks, two engines, ten updates: who has which weights, and what a killed engine changes.

Real training, real servers on a CPU: one that the run only knows by its URL, one of its own with two tensor-parallel
ranks. Not covered: CUDA, engines on other machines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_pool import Ranks
from several_worker import KILLED_AT, UPDATES, train_with_two_engines

from owpo_megatron.engine import Fleet

pytestmark = [pytest.mark.server, pytest.mark.ranks]


@pytest.fixture(scope="module")
def held(
    ranks: Ranks, engine: Fleet, engine_python: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    url, folder = engine.clients[0].url, tmp_path_factory.mktemp("several")
    return ranks.run(2, train_with_two_engines, tiny_model, url, str(engine_python), folder, timeout=900)[0]


def test_both_engines_agree_with_the_trainer_after_every_update(held: Any) -> None:
    """Log-probs within 1e-4 in fp32 (mean over an engine's samples), and every parameter's checksum, shards included,
    by every transport."""
    assert len(held["rounds"]) == UPDATES
    for version, found in enumerate(held["rounds"], 1):
        assert found["versions"] == [version, version]
        assert len(found["differences"]) == 2 and max(found["differences"]) < 1e-4


def test_an_engine_killed_in_the_middle_of_a_push_comes_back_with_its_version(held: Any) -> None:
    """One engine was restarted, at that push only; the other one not at all."""
    restarts = [found["restarts"] for found in held["rounds"]]
    assert restarts == [[0, 0]] * (KILLED_AT - 1) + [[0, 1]] * (UPDATES - KILLED_AT + 1)


def test_engines_behind_a_router(held: Any) -> None:
    """Weights go to each of the two, samples through the router: the same tokens as without it, from their seeds."""
    router = held["router"]
    assert router["engines"] == 2 and max(router["differences"]) < 1e-4
    assert router["versions"] == [UPDATES + 1]
    assert router["same tokens"] == 32
