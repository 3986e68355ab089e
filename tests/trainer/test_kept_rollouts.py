"""Rollouts are written while their step goes on, and are on disk before it is reported as done."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from test_plans import PROMPTS

from owpo_megatron.engine import load_rollouts, rollouts_path
from owpo_megatron.run.layout import RunFolder
from owpo_megatron.samples import SampleRecorder
from owpo_megatron.trainer import build_checks
from owpo_megatron.trainer.build_checks import KeptRollouts
from owpo_megatron.types import Group, Rollout, TokenIds, TokenValues, Verdict


def group(seed: int) -> Group:
    rollout = Rollout(PROMPTS[0], TokenIds([1, 2]), TokenValues([-0.5, -0.25]), 0, "stop", seed)
    return Group((rollout,), (Verdict(True, "ok"),), (1.0,))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_the_step_goes_on_while_its_rollouts_are_written(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    real, may_write = build_checks.save_rollouts, threading.Event()
    monkeypatch.setattr(build_checks, "save_rollouts", lambda *given: may_write.wait(60) and real(*given))
    kept = KeptRollouts(folder, SampleRecorder(folder.samples, 0), replays=False)
    path = rollouts_path(folder.rollouts, 4)
    kept.record(3, [group(1)], [group(1)])
    assert not path.exists(), "the step goes on without waiting for the disk"
    may_write.set()
    kept.wait()
    assert [one.seed for one in load_rollouts(path)] == [1]


def test_a_disk_that_refuses_ends_the_step(folder: RunFolder) -> None:
    kept = KeptRollouts(folder, SampleRecorder(folder.samples, 0), replays=False)
    folder.rollouts.write_text("a file where the folder should be")
    kept.record(0, [group(1)], [group(1)])
    with pytest.raises(OSError, match="rollouts"):
        kept.wait()
    kept.wait()  # raised once


def test_a_step_is_saved_on_request(folder: RunFolder) -> None:
    """A step that fails is kept also where nothing is recorded."""
    kept = KeptRollouts(folder, None, replays=False)
    kept.record(0, [group(1)], [group(1)])
    kept.wait()
    assert not folder.rollouts.exists()
    kept.save()
    assert [one.seed for one in load_rollouts(rollouts_path(folder.rollouts, 1))] == [1]
