"""Rollouts on disk and their replay."""

from __future__ import annotations

from pathlib import Path

import pytest

from owpo_megatron.engine import RecordedEngine, load_rollouts, rollouts_path, save_rollouts
from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.types import Prompt, Rollout, SampleRequest, Sampling

PROMPTS = [Prompt("a/1", (5, 6), "Übung √2", "1"), Prompt("b/2", (7,), "y", "2", domain="cipher")]


def rollout(prompt: Prompt, seed: int, logp: float = -0.1) -> Rollout:
    return Rollout(prompt, (3, 2), (logp, -1 / 3), policy_version=4, finish_reason="length", seed=seed)


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    rollouts = [rollout(PROMPTS[0], 2**62 + 1, logp=-0.1 - 1e-17), rollout(PROMPTS[1], 0, logp=-1.2e-38)]
    save_rollouts(rollouts_path(tmp_path, 3), rollouts)
    assert load_rollouts(tmp_path / "step_000003.jsonl") == rollouts
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003.jsonl"], "a temporary file was left"


def test_an_interrupted_save_leaves_no_file(tmp_path: Path) -> None:
    def broken():
        yield rollout(PROMPTS[0], 1)
        raise RuntimeError("killed here")

    with pytest.raises(RuntimeError, match="killed here"):
        save_rollouts(rollouts_path(tmp_path, 0), broken())
    with pytest.raises(UserError, match="no step_"):
        RecordedEngine(tmp_path)


def test_replay_finds_samples_by_prompt_and_seed(tmp_path: Path) -> None:
    save_rollouts(rollouts_path(tmp_path, 0), [rollout(PROMPTS[0], 1), rollout(PROMPTS[1], 1)])
    save_rollouts(rollouts_path(tmp_path, 1), [rollout(PROMPTS[0], 2, logp=-9.0)])
    engine = RecordedEngine(tmp_path)
    seen: list[tuple[int, int]] = []
    requests = [SampleRequest(PROMPTS[0], 2), SampleRequest(PROMPTS[1], 1), SampleRequest(PROMPTS[0], 1)]
    got = engine.generate(requests, Sampling(2), lambda done, total: seen.append((done, total)))
    assert got == [rollout(PROMPTS[0], 2, logp=-9.0), rollout(PROMPTS[1], 1), rollout(PROMPTS[0], 1)]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert engine.weight_versions() == []


def test_what_was_not_recorded_is_an_error(tmp_path: Path) -> None:
    save_rollouts(rollouts_path(tmp_path, 0), [rollout(PROMPTS[0], 1)])
    engine = RecordedEngine(tmp_path)
    with pytest.raises(EngineError, match="a/1 with seed 9"):
        engine.generate([SampleRequest(PROMPTS[0], 9)], Sampling(2))
    with pytest.raises(EngineError, match="other tokens"):
        engine.generate([SampleRequest(Prompt("a/1", (5, 9), "x", "1"), 1)], Sampling(2))


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = rollouts_path(tmp_path, 0)
    save_rollouts(path, [rollout(PROMPTS[0], 1)])
    path.write_text(path.read_text() + '{"prompt": 1}\n')
    with pytest.raises(UserError, match=r"step_000000.jsonl:2"):
        load_rollouts(path)
