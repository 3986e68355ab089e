"""Runs with an environment and a real SGLang server: two ranks, episodes of several turns, killed and resumed.

The task is `lookup`, whose base model has the shape of the quickstart's, so that the server is the same. That it learns
to use its tool takes minutes and is a test of the tier `extra`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from owpo import ROOT, newest_step, steps_of, values, write_config
from rank_pool import Ranks
from warm import WarmRun, train

from owpo_megatron.api.evaluate import evaluate
from owpo_megatron.config import Config
from owpo_megatron.data import load_tokenizer
from owpo_megatron.data.tasks.lookup import table_of
from owpo_megatron.engine import load_rollouts, rollouts_path
from owpo_megatron.evaluation.sets import HELD_OUT
from owpo_megatron.run.layout import RunFolder
from owpo_megatron.run.metrics_reader import read_run
from owpo_megatron.samples.record import read_rows
from owpo_megatron.types import Rollout

pytestmark = [pytest.mark.server, pytest.mark.ranks]
STEPS = 3


@pytest.fixture(scope="module")
def wanted(server_url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sections of three steps of sixteen episodes, on a base model that has begun to use the tool."""
    from base_model import RECIPES, make_base_model

    settings = replace(RECIPES["lookup"], steps=60)
    with FileLock(ROOT / "cache" / "base_models.lock"):
        model = make_base_model(settings, ROOT / "cache" / "base_models")
    here = tmp_path_factory.mktemp("episodes")
    environment = {"name": "python:marked_lookup:MarkedLookup", "args": {"mark": str(here / "mark")}, "timeout": 60}
    return {
        "seed": 5,
        "model": {"path": str(model)},
        "runs_dir": str(here),
        "data": {"source": "task:lookup", "max_prompt_tokens": 8},
        "environment": environment | {"max_turns": 4},
        "algorithm": {"name": "owpo"},
        "rollout": {"prompts_per_step": 4, "group_size": 8, "max_response_tokens": 16, "dynamic_sampling": False},
        "optimizer": {"steps": STEPS, "updates_per_step": 2, "lr": 1e-3, "warmup_steps": 1},
        "reference": {"every": 2},
        "parallel": {"tp": 2, "sp": True},
        "eval": {"before": False, "after": True, "samples": 2, "pass_at": [1], "limit": 8},
        "checkpoint": {"every": 0},
        "engine": {"urls": [server_url]},
    }


@pytest.fixture(scope="module")
def straight(ranks: Ranks, wanted: dict[str, Any]) -> Path:
    file = write_config(Path(wanted["runs_dir"]) / "straight.yaml", wanted, {"name": "straight"})
    train(ranks, file)
    return Path(wanted["runs_dir"]) / "straight"


def episodes_of(run_dir: Path) -> list[Rollout]:
    run = RunFolder(run_dir)
    return [one for step in range(1, STEPS + 1) for one in load_rollouts(rollouts_path(run.rollouts, step))]


def test_episodes_have_turns_and_every_observation_is_the_tables(straight: Path) -> None:
    rollouts, entries = episodes_of(straight), 0
    assert len(rollouts) == 32 * STEPS
    for one in rollouts:
        assert one.episode is not None and sum(span.length for span in one.episode.spans) == len(one.response_ids)
        assert one.episode.spans[0].generated and one.episode.spans[-1].generated
        assert all(span.policy_version == one.policy_version for span in one.episode.turns)
        start = 0
        for span in one.episode.spans:
            shown = one.response_ids[start : start + span.length]
            if span.generated:
                asked = shown
            elif not span.errors:  # ids are alphabet's places + 3: a is 3, 0 is 29
                key = chr(ord("a") + asked[0] - 3)
                assert shown == (29 + table_of(one.prompt.id)[key],)
                entries += 1
            start += span.length
    assert entries > 10, "the base model seldom asks: nothing was shown"
    steps = steps_of(straight)
    assert max(values(steps, "turns")) > 1 and max(values(steps, "observation_tokens")) > 0
    assert sum(values(steps, "tokens_generated")) == sum(one.generated_length for one in rollouts)
    assert json.loads((straight / "summary.json").read_text())["engine"]["name"] == "sglang"


def test_engine_and_trainer_agree_on_generated_tokens_after_every_push(straight: Path) -> None:
    steps = steps_of(straight)
    mismatches = values(steps, "mismatch")
    assert len(mismatches) == STEPS and 0 < max(mismatches) < 1e-4
    assert values(steps, "policy_version") == list(range(STEPS))
    generated = sum(one.generated_length for one in episodes_of(straight))
    assert sum(values(steps, "tokens")) == generated, "the divisor counts no observation"


def test_log_probs_of_every_generated_token_agree_after_every_push(straight: Path) -> None:
    """The trainer's, as recorded at the start of each step's updates, and the engine's; rounded to five digits."""
    run, compared = RunFolder(straight), 0
    for step in range(1, STEPS + 1):
        rollouts = load_rollouts(rollouts_path(run.rollouts, step))
        for rollout, row in zip(rollouts, read_rows(run.samples, step), strict=True):
            assert (row.prompt_id, row.seed) == (rollout.prompt.id, rollout.seed) and row.old_logp is not None
            values = zip(rollout.behaviour_logp, row.old_logp, rollout.loss_mask or (), strict=True)
            differences = [abs(engine - trainer) for engine, trainer, generated in values if generated]
            assert max(differences) < 1e-4
            compared += len(differences)
    assert compared == sum(one.generated_length for one in episodes_of(straight))


def test_killed_in_the_middle_of_an_episode_it_ends_in_the_same_bits(
    ranks: Ranks, straight: Path, wanted: dict[str, Any]
) -> None:
    runs, mark = Path(wanted["runs_dir"]), Path(wanted["environment"]["args"]["mark"])
    file = write_config(runs / "killed.yaml", wanted, {"name": "killed"})
    first = WarmRun(ranks, file, "checkpoint.every=1", "environment.args.seconds=0.2")
    first.wait_until(lambda: newest_step(runs / "killed") >= 2, "step 2")
    seen = mark.stat().st_size
    first.wait_until(lambda: mark.stat().st_size > seen + 3, "an episode of step 3", every=0.001)
    first.kill()
    assert newest_step(runs / "killed") == 2, "killed too late to be conclusive"
    last = WarmRun(ranks, file, "rollout.workers=2")
    assert "resumed at step 2" in last.done()
    assert len(list((runs / "killed" / "logs").glob("rollout_worker_?.log"))) == 2, "who asks changes no bit either"
    assert untimed(runs / "killed") == untimed(straight)
    assert episodes_of(runs / "killed") == episodes_of(straight)
    for weights in sorted((straight / "hf").glob("*.safetensors")):
        assert (runs / "killed" / "hf" / weights.name).read_bytes() == weights.read_bytes()


def test_recorded_episodes_train_to_the_same_bits(ranks: Ranks, straight: Path, wanted: dict[str, Any]) -> None:
    layers = (wanted, {"name": "again", "eval": {"after": False}, "engine": {"urls": []}})
    replay = {"rollout": wanted["rollout"] | {"replay": str(straight / "rollouts")}}
    train(ranks, write_config(Path(wanted["runs_dir"]) / "again.yaml", *layers, replay))
    assert values(steps_of(Path(wanted["runs_dir"]) / "again"), "weights") == values(steps_of(straight), "weights")


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "tool_seconds"} for line in steps_of(run_dir)]


def test_owpo_eval_plays_episodes(straight: Path, server_url: str, tmp_path: Path) -> None:
    """The run's weights with its environment: entries of the table, verdicts, lengths without entries."""
    overrides = [f"engine.urls=[{server_url}]"]
    result = evaluate(straight, overrides=overrides, samples=2, limit=8, seed=3, out=tmp_path)
    (scores,) = result.scores
    (file,) = tmp_path.rglob(f"{HELD_OUT}.jsonl")
    problems = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(problems) == 8 and scores["metrics"]["pass@1"]["value"] == result["pass@1"]
    tokenizer, looks = load_tokenizer(straight / "hf"), 0
    for problem in problems:
        for ids, verdict, length in zip(problem["responses"], problem["verdicts"], problem["lengths"], strict=True):
            first, *more = tokenizer.decode_all(ids).removesuffix("<eos>").split("<eos>")
            replies, entries = [first, *(text[1:] for text in more)], [text[0] for text in more]
            assert length == len(ids) - len(entries), "entries of the table are no tokens of the policy"
            for reply, entry in zip(replies, entries, strict=False):
                assert entry == str(table_of(problem["id"]).get(reply.removesuffix("?"), "-"))
            assert (verdict == "ok") == (replies[-1] == problem["answer"])
            looks += len(entries)
    assert looks > 0, "no episode had a second turn"


@pytest.mark.extra
def test_it_learns_to_use_the_tool(ranks: Ranks, server_url: str, tmp_path: Path) -> None:
    """The recipe of the documents: a base model that seldom looks, and a policy that looks both keys up and adds."""
    from base_model import RECIPES, make_base_model

    with FileLock(ROOT / "cache" / "base_models.lock"):
        model = make_base_model(RECIPES["lookup"], ROOT / "cache" / "base_models")
    file = ROOT / "examples" / "quickstart" / "lookup.yaml"
    config = Config.load(file, [f"model.path={model}", f"runs_dir={tmp_path}", f"engine.urls=[{server_url}]"])
    config.save(tmp_path / "lookup.yaml")
    train(ranks, tmp_path / "lookup.yaml", timeout=1800)
    scores = read_run(tmp_path / "lookup").eval_column("pass@1").values
    assert scores[0] < 0.1 and scores[-1] > 0.8
