"""Checkpoint folders: whole or not there, damage is noticed, old ones go. The sharded state is a dummy file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from owpo_megatron.errors import UserError
from owpo_megatron.run.checkpoints import CheckpointFolder


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", keep=2)


def write(folder: CheckpointFolder, step: int, text: str = "weights") -> Path:
    (folder.start(step) / "shard").write_text(f"{text} {step}")
    return folder.finish(step, {"step": step})


def test_nothing_there(folder: CheckpointFolder) -> None:
    assert folder.newest() is None


def test_the_newest_is_read_and_the_oldest_go(folder: CheckpointFolder) -> None:
    for step in (2, 10, 9):
        write(folder, step)
    assert folder.steps() == [9, 10]
    found = folder.newest()
    assert found is not None
    state, trainer = found
    assert (state / "shard").read_text() == "weights 10" and trainer == {"step": 10}


def test_an_unfinished_one_is_ignored_and_written_anew(folder: CheckpointFolder) -> None:
    write(folder, 1)
    (folder.start(2) / "shard").write_text("half")
    (folder.state_path(2) / "stale").touch()
    assert folder.newest()[1] == {"step": 1}  # type: ignore[index]
    path = write(folder, 2)
    assert sorted(file.name for file in (path / "state").iterdir()) == ["shard"]
    assert folder.newest()[1] == {"step": 2}  # type: ignore[index]


def test_a_failing_finish_leaves_the_one_before(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rename is the last thing that can fail: before it, nothing counts."""
    write(folder, 1)

    def fail(*paths: object) -> None:
        raise OSError("disk is gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="gone"):
        write(folder, 2)
    assert folder.steps() == [1]


@pytest.mark.parametrize("damage", ["state/shard", "trainer.json"])
@pytest.mark.parametrize("how", ["changed", "cut", "gone"])
def test_a_damaged_one_falls_back_to_the_one_before(folder: CheckpointFolder, damage: str, how: str) -> None:
    write(folder, 1)
    file = write(folder, 2) / damage
    if how == "gone":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes(data[:-1] if how == "cut" else bytes([data[0] ^ 1]) + data[1:])
    assert folder.newest()[1] == {"step": 1}  # type: ignore[index]
    with pytest.raises(UserError, match="is damaged: .*(another content|missing)"):
        folder.read(folder.path(2))
    assert folder.read(folder.path(1))[1] == {"step": 1}


def test_when_every_one_is_damaged_the_user_decides(folder: CheckpointFolder) -> None:
    """Starting over by itself would drop the metrics of the run."""
    for step in (1, 2):
        (write(folder, step) / "state" / "shard").write_text("x")
    with pytest.raises(UserError, match="checkpoints = .*every checkpoint here is damaged .*move the folder away"):
        folder.newest()


def test_the_same_step_can_be_saved_again(folder: CheckpointFolder) -> None:
    write(folder, 1)
    write(folder, 1, text="again")
    state, _ = folder.newest()  # type: ignore[misc]
    assert (state / "shard").read_text() == "again 1"
