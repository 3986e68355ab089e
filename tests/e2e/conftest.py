"""The quickstart's base model, recorded rollouts for it, and a server for it; each made once a session."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import record_rollouts
from filelock import FileLock
from owpo import ROOT

from owpo_megatron.config import Config, EngineConfig
from owpo_megatron.engine import start_fleet

sys.path.insert(0, str(ROOT / "examples" / "quickstart"))

SMALL: dict[str, Any] = {
    "seed": 3,
    "data": {"source": "task:cipher", "max_prompt_tokens": 16},
    "rollout": {"prompts_per_step": 8, "group_size": 4, "max_response_tokens": 8},
    "optimizer": {"steps": 10, "updates_per_step": 2, "lr": 2e-4, "warmup_steps": 4, "tokens_per_microbatch": 128},
    "reference": {"every": 4},
    "eval": {"before": False, "after": False},
    "checkpoint": {"every": 0, "keep": 20},
}


@pytest.fixture(scope="session")
def base_model() -> Path:
    """The cipher base model of the quickstart (about ten seconds of one core where cache/ does not have it)."""
    from base_model import RECIPES, make_base_model

    (ROOT / "cache").mkdir(exist_ok=True)
    with FileLock(ROOT / "cache" / "base_models.lock"):  # pytest-xdist: one process makes it, the other waits
        return make_base_model(RECIPES["cipher"], ROOT / "cache" / "base_models")


@pytest.fixture(scope="session")
def small(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sections of a ten-step OWPO run on the base model, with swaps after steps 4 and 8."""
    return SMALL | {"model": {"path": str(base_model)}, "runs_dir": str(tmp_path_factory.mktemp("runs"))}


@pytest.fixture(scope="session")
def recorded(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`small` on rollouts that a fake engine drew: real prompts, tokens and verdicts, made-up log-probs."""
    folder = tmp_path_factory.mktemp("recorded")
    prompts = record_rollouts(Config.build(small), folder, steps=small["optimizer"]["steps"])
    assert max(prompts) > 8, "dynamic sampling had nothing to replace; the cursor would go unnoticed"
    return small | {"rollout": small["rollout"] | {"replay": str(folder)}}


@pytest.fixture(scope="session")
def long_recorded(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same for a run of minutes, which a test ends before."""
    folder = tmp_path_factory.mktemp("long_recorded")
    long = small | {"optimizer": small["optimizer"] | {"steps": 300}}
    record_rollouts(Config.build(long), folder, steps=300)
    return long | {"rollout": small["rollout"] | {"replay": str(folder)}}


@pytest.fixture(scope="session")
def server_url(engine_python: Path, base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real SGLang server with the base model's shape, for runs that name it in engine.urls and push their weights."""
    config = EngineConfig(python=engine_python, device="cpu")
    with start_fleet(config, base_model, "float32", {}, tmp_path_factory.mktemp("server")) as fleet:
        yield fleet.clients[0].url
