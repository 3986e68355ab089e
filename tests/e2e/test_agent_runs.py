"""Agents and the real engine, with the official client: trained as an environment, and recorded by `owpo serve`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from filelock import FileLock
from owpo import ROOT, Owpo, steps_of, values, write_config
from rank_pool import Ranks
from warm import train

from owpo_megatron.data.tasks import get_task
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


def test_recorded_sessions_train(
    ranks: Ranks, model: Path, served: tuple[str, str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four problems, four sessions each, by the official client; a step on them sees the log-probs of the engine."""
    monkeypatch.syspath_prepend(str(SITES[0]))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    import openai
    from lookup_agent import solve

    _, url, folder = served
    assert openai.OpenAI(base_url=url, api_key="x").models.list().data[0].id == model.name
    for problem in get_task("lookup").problems("train")[:PROBLEMS]:
        for sibling in range(SIBLINGS):
            name = f"{problem.id}#{sibling}"
            reward = solve(openai.OpenAI(base_url=url, api_key=name, max_retries=0), problem)
            told = httpx.post(
                f"{url}/sessions/end", json={"reward": reward}, headers={"X-Session": name}, trust_env=False
            )
            assert told.json()["session"] == name, told.text
    sessions = episodes_of(folder / "rollouts", PROBLEMS * SIBLINGS)
    assert len({one.prompt.id for one in sessions}) == PROBLEMS and any(len(one.episode.turns) > 1 for one in sessions)
    layers = (
        wanted(model, tmp_path),
        {"name": "replayed", "data": {"source": str(folder / "problems.jsonl")}, "optimizer": {"steps": 1}},
    )
    replay = {"rollout": layers[0]["rollout"] | {"replay": str(folder / "rollouts")}}
    train(ranks, write_config(tmp_path / "replayed.yaml", *layers, replay))
    (step,) = steps_of(tmp_path / "replayed")
    assert step["tokens"] == sum(one.generated_length for one in sessions)
    assert 0 < step["mismatch"] < 1e-4, "log-probs as the engine gave them, of the tokens that it wrote"
    assert step["reward_mean"] == pytest.approx(sum(one.judgement.score for one in sessions) / len(sessions))


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
