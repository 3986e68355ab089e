"""A run that was killed, or stopped, and started again ends in the same bits as one that was not.

On recorded rollouts, so that nothing but the trainer is looked at; with two tensor-parallel ranks on a CPU. A machine
that loses unwritten disk caches is not covered.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from owpo import Owpo, newest_step, steps_of, without, write_config
from rank_pool import Ranks
from warm import WarmRun, train

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def straight(ranks: Ranks, recorded: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of ten steps without interruption, with a checkpoint at the end alone."""
    here = tmp_path_factory.mktemp("straight")
    config = write_config(here / "run.yaml", recorded, {"name": "straight", "parallel": {"tp": 2}})
    train(ranks, config)
    return Path(recorded["runs_dir"]) / "straight"


class Interrupted:
    """A run of the same configuration that is started several times, by the `owpo` command or on forked ranks."""

    def __init__(self, recorded: dict[str, Any], here: Path, name: str):
        self.config = write_config(here / "run.yaml", recorded, {"name": name, "parallel": {"tp": 2}})
        self.run_dir = Path(recorded["runs_dir"]) / name
        self._here = here

    def start(self, *overrides: str) -> Owpo:
        return Owpo(self._here, "train", "-c", str(self.config), *overrides)

    def start_warm(self, ranks: Ranks, *overrides: str) -> WarmRun:
        return WarmRun(ranks, self.config, *overrides)

    def when(self, step: int) -> Callable[[], bool]:
        """Return a check for a line of this step, or of a later one."""
        return lambda: newest_step(self.run_dir) >= step


def resumed_at(owpo: Owpo | WarmRun) -> tuple[int, int]:
    """Return (step, ref id) from which the run reported to resume."""
    found = re.search(r"resumed at step (\d+) .*reference (\d+)", owpo.stdout)
    assert found, owpo.told()
    return int(found.group(1)), int(found.group(2))


def checkpoint(run_dir: Path, step: int) -> dict[str, Any]:
    """The trainer's part of a checkpoint: reference, cursor; without the copy of the metrics line."""
    return without(json.loads((folder(run_dir, step) / "trainer.json").read_text()), "line", "run")


def folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:06d}"


def sharded(run_dir: Path, step: int) -> dict[str, bytes | str]:
    """Policy, optimizer and reference: every shard's bytes, and the values next to the shards."""
    state = folder(run_dir, step) / "state"
    shards: dict[str, bytes | str] = {file.name: file.read_bytes() for file in state.glob("*.distcp")}
    return shards | {"common": str(torch.load(state / "common.pt", weights_only=False))}


def assert_same_end(ours: Path, theirs: Path, steps: int = 10) -> None:
    """Every line but its seconds, the exported weights, and the final checkpoint with optimizer, reference, cursor."""
    our_lines, their_lines = steps_of(ours), steps_of(theirs)
    assert [line["step"] for line in our_lines] == list(range(1, steps + 1))
    for our_line, their_line in zip(our_lines, their_lines, strict=True):
        assert our_line == their_line
    for file in sorted((theirs / "hf").glob("*.safetensors")):
        assert (ours / "hf" / file.name).read_bytes() == file.read_bytes()
    assert checkpoint(ours, steps) == checkpoint(theirs, steps)
    assert sharded(ours, steps) == sharded(theirs, steps)


def test_killed_between_checkpoints_and_while_writing_one(
    ranks: Ranks, straight: Path, recorded: dict[str, Any], tmp_path: Path
) -> None:
    """Steps are trained again; the second resume is from a checkpoint whose reference is the policy (step 8)."""
    run = Interrupted(recorded, tmp_path, "killed")
    first = run.start_warm(ranks, "checkpoint.every=3")
    first.wait_until(run.when(7), "step 7")
    first.kill()
    second = run.start_warm(ranks, "checkpoint.every=1")
    writing = run.run_dir / "checkpoints" / ".writing_000009"
    second.wait_until(writing.exists, "writing of checkpoint 9", every=0.001)
    second.kill()
    assert resumed_at(second) == (6, 1)
    assert writing.exists() and max(saved_steps(run.run_dir)) == 8, "killed too late to be conclusive"
    assert checkpoint(run.run_dir, 8)["reference"]["is_policy"]
    third = run.start_warm(ranks)
    third.done()
    assert resumed_at(third) == (8, 2)
    assert_same_end(run.run_dir, straight)
    assert [first.survivors(), second.survivors(), third.survivors()] == [[], [], []]


def saved_steps(run_dir: Path) -> list[int]:
    return [int(path.name[-6:]) for path in (run_dir / "checkpoints").glob("step_*")]


def test_stopped_and_killed_with_a_reference_of_its_own(
    ranks: Ranks, straight: Path, recorded: dict[str, Any], tmp_path: Path
) -> None:
    """SIGTERM and SIGINT finish the step, save it and end with code 0; then SIGKILL between two checkpoints."""
    run = Interrupted(recorded, tmp_path, "stopped")
    saved = []
    for number in (signal.SIGTERM, signal.SIGINT):
        owpo = run.start()
        owpo.wait_until(run.when(max(saved, default=0) + 2), "two steps")
        owpo.signal(number)
        assert "stopped; saved up to step" in owpo.done()
        saved.append(max(saved_steps(run.run_dir)))
        assert newest_step(run.run_dir) == saved[-1] < 10, "the step of the signal is finished and saved"
        assert not (run.run_dir / "summary.json").exists()
        assert owpo.survivors() == []
    third = run.start("checkpoint.every=1")
    third.wait_until(run.when(max(5, saved[-1] + 1)), "step 5")
    third.kill()
    last = run.start_warm(ranks)
    last.done()
    at, ref_id = resumed_at(last)
    assert at >= 5 and ref_id == at // 4
    assert_same_end(run.run_dir, straight)
    assert third.survivors() + last.survivors() == []


def test_a_killed_rank_ends_the_job_with_one_line(long_recorded: dict[str, Any], tmp_path: Path) -> None:
    run = Interrupted(long_recorded, tmp_path, "rank_killed")
    owpo = run.start()
    owpo.wait_until(run.when(2), "step 2")
    os.kill(owpo.ranks()[1].pid, signal.SIGKILL)
    assert owpo.wait(timeout=60) == 1
    assert owpo.stderr.startswith("failed: rank 1 was ended by SIGKILL") and owpo.stderr.count("\n") == 1
    assert owpo.survivors() == []


def test_ranks_end_with_their_launcher(long_recorded: dict[str, Any], tmp_path: Path) -> None:
    """Only the `owpo` process is killed: nothing goes on in a folder that another `owpo train` may take over."""
    run = Interrupted(long_recorded, tmp_path, "launcher_killed")
    owpo = run.start()
    owpo.wait_until(run.when(1), "step 1")
    psutil.Process(owpo.process.pid).kill()
    owpo.process.wait()
    survivors = owpo.survivors(patience=30)
    owpo.kill_family()
    assert survivors == [] and newest_step(run.run_dir) < 300
