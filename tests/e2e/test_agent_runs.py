"""Agents and the real engine, with the official client: trained as an environment, and recorded by `owpo serve`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from owpo import ROOT, Owpo, steps_of, values, write_config

from owpo_megatron.engine import load_rollouts, rollouts_path
from owpo_megatron.types import Rollout

SITES = sorted((ROOT / ".venv-agents" / "lib").glob("python*/site-packages"))
pytestmark = [
    *(pytest.mark.extra, pytest.mark.server, pytest.mark.ranks),
    pytest.mark.skipif(not SITES, reason="no .venv-agents; run `make agents`"),
]
HERE = Path(__file__).parent
PATH = ":".join(map(str, (ROOT, HERE, *SITES)))
STEPS, PROBLEMS, SIBLINGS = 2, 4, 4


@pytest.fixture(scope="module")
def model() -> Path:
    from base_model import RECIPES, make_base_model

    with FileLock(ROOT / "cache" / "base_models.lock"):
        return make_base_model(replace(RECIPES["lookup"], steps=60), ROOT / "cache" / "base_models")


@pytest.fixture(scope="module")
def served(
    engine_python: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str, Path]]:
    """(URL of the engine, URL for agents, folder of their sessions): one `owpo serve` for both tests."""
    here = tmp_path_factory.mktemp("served")
    arguments = ["--device", "cpu", "--port", "0", "--record", str(here / "sessions"), "--log", str(here / "log")]
    served = Owpo(here, "serve", str(model), *arguments, "--python", str(engine_python), COLUMNS="300")
    try:
        served.wait_until(lambda: "serving at" in served.stdout, "an engine", timeout=300)
        (agents,) = re.findall(r"agents ask (\S+)", served.stdout)
        (engine,) = re.findall(r"serving at (\S+)", served.stdout)
        yield engine, agents, here / "sessions"
    finally:
        served.process.terminate()
        served.wait(60)


def wanted(model: Path, runs: Path) -> dict[str, Any]:
    return {
        "seed": 5,
        "model": {"path": str(model)},
        "runs_dir": str(runs),
        "data": {"source": "task:lookup", "max_prompt_tokens": 8},
        "algorithm": {"name": "grpo"},
        "rollout": {
            **{"prompts_per_step": PROBLEMS, "group_size": SIBLINGS, "max_response_tokens": 16},
            **{"dynamic_sampling": False, "save_tokens": PROBLEMS},
        },
        "optimizer": {"steps": STEPS, "updates_per_step": 1, "lr": 1e-3, "warmup_steps": 1},
        "eval": {"before": False, "after": False},
        "checkpoint": {"every": 0},
    }


def episodes_of(folder: Path, steps: int) -> list[Rollout]:
    return [one for step in range(1, steps + 1) for one in load_rollouts(rollouts_path(folder, step))]


def test_an_agent_trains_as_the_environment_that_it_is(
    model: Path, served: tuple[str, str, Path], tmp_path: Path
) -> None:
    """The task's environment, and the same as an agent: tokens, log-probs, rewards, weights."""
    engine, _, _ = served
    environments = {
        "own": {"name": "lookup", "timeout": 60},
        "agent": {"name": "agent", "args": {"function": "lookup_agent:solve", "seconds": 50}, "timeout": 60},
    }
    for name, environment in environments.items():
        urls = {"name": name, "engine": {"urls": [engine]}, "environment": environment | {"max_turns": 4}}
        file = write_config(tmp_path / f"{name}.yaml", wanted(model, tmp_path), urls)
        run = Owpo(tmp_path / f"{name}_out", "train", "-c", str(file), PYTHONPATH=PATH)
        assert run.wait(300) == 0, run.told()
    own, agent = (episodes_of(tmp_path / name / "rollouts", STEPS) for name in environments)
    assert any(len(one.episode.turns) > 1 for one in own)
    for one, other in zip(own, agent, strict=True):
        assert (one.response_ids, one.behaviour_logp, one.seed) == (
            other.response_ids,
            other.behaviour_logp,
            other.seed,
        )
        assert one.judgement == other.judgement and one.loss_mask == other.loss_mask
    assert values(steps_of(tmp_path / "agent"), "weights") == values(steps_of(tmp_path / "own"), "weights")
