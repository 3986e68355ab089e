"""Rollouts on disk and their replay."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from owpo_megatron.engine import RecordedEngine, load_rollouts, rollouts_path, save_rollouts
from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.run.rollouts import plain_rollout
from owpo_megatron.types import Prompt, Rollout, SampleRequest, Sampling, TokenIds, TokenValues

PROMPTS = [Prompt("a/1", (5, 6), "Übung √2", "1"), Prompt("b/2", (7,), "y", "2", domain="cipher")]


def rollout(prompt: Prompt, seed: int, logp: float = -0.1) -> Rollout:
    logps = TokenValues([logp, -1 / 3])
    return Rollout(prompt, TokenIds([3, 2]), logps, policy_version=4, finish_reason="length", seed=seed)


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    expert = Rollout(PROMPTS[1], (3,), (), 0, "stop", 5, origin="expert", trained_ids=(7, 8))
    rollouts = [rollout(PROMPTS[0], 2**62 + 1, logp=-0.1), expert, rollout(PROMPTS[1], 0, logp=-1.2e-38)]
    save_rollouts(rollouts_path(tmp_path, 3), rollouts)
    assert load_rollouts(tmp_path / "step_000003.jsonl") == rollouts
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_000003.jsonl", "step_000003.tokens"], "a temporary file was left"
    assert (tmp_path / "step_000003.tokens").stat().st_size == 4 * (5 + 4), "4 bytes per id and per log-prob"


def test_lines_with_their_own_tokens_are_read(tmp_path: Path) -> None:
    """Files of earlier versions, and the committed curve's."""
    saved = rollout(PROMPTS[0], 1)
    rollouts_path(tmp_path, 1).write_text(json.dumps(plain_rollout(saved)) + "\n")
    assert load_rollouts(rollouts_path(tmp_path, 1)) == [saved]


def test_lines_never_meet_the_tokens_of_another_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is saved again and killed between the two renames has no lines, instead of wrong tokens."""
    path = rollouts_path(tmp_path, 1)
    save_rollouts(path, [rollout(PROMPTS[0], 1)])
    real = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_rollouts(path, [rollout(PROMPTS[1], 9, logp=-2.0)])
    assert not path.exists()


@pytest.mark.parametrize(("left", "complaint"), [(None, "are missing: step_000000.tokens"), (7, "ends before its")])
def test_tokens_that_are_gone_are_named(tmp_path: Path, left: int | None, complaint: str) -> None:
    path = rollouts_path(tmp_path, 0)
    save_rollouts(path, [rollout(PROMPTS[0], 1)])
    tokens = path.with_suffix(".tokens")
    tokens.unlink() if left is None else tokens.write_bytes(tokens.read_bytes()[:left])
    with pytest.raises(UserError, match=f"step_000000.jsonl:1.*{complaint}"):
        load_rollouts(path)


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
