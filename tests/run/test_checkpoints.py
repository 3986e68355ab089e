"""The folder of checkpoints after every kind of interruption and damage: never a traceback, nothing left behind.

The sharded state is a dummy file. That a run resumes from such a folder bit for bit: tests/e2e and tests/faults.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from owpo_megatron.errors import RunError, UserError
from owpo_megatron.run import checkpoints as module
from owpo_megatron.run.checkpoints import CheckpointFolder
from owpo_megatron.run.layout import RunFolder, steps_in, whole_steps
from owpo_megatron.run.metrics import MetricsFile
from owpo_megatron.run.sealed import fault_of


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    """Checkpoints of the steps 2, 4 and 6; three are kept."""
    made = CheckpointFolder(tmp_path, keep=3)
    for step in (2, 4, 6):
        write(made, step)
    return made


def write(folder: CheckpointFolder, step: int, content: str = "") -> None:
    (folder.start(step) / "shard").write_text(content or f"weights of {step}")
    folder.finish(step, {"step": step})


def newest(folder: CheckpointFolder) -> int:
    found = folder.newest()
    assert found is not None
    state, trainer = found
    assert (state / "shard").read_text() == f"weights of {trainer['step']}"
    return trainer["step"]


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(os.listdir(folder.path(2).parent))


def test_a_whole_folder(folder):
    assert newest(folder) == 6 and folder.damaged == {}
    write(folder, 8)
    assert names(folder) == ["step_000004", "step_000006", "step_000008"] and newest(folder) == 8


DAMAGES = {
    "manifest cut": lambda at: (at / "manifest.json").write_bytes((at / "manifest.json").read_bytes()[:40]),
    "manifest empty": lambda at: (at / "manifest.json").write_bytes(b""),
    "manifest {}": lambda at: (at / "manifest.json").write_text("{}"),
    "manifest []": lambda at: (at / "manifest.json").write_text("[1]"),
    "manifest of bytes": lambda at: (at / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "manifest of numbers": lambda at: (at / "manifest.json").write_text('{"trainer.json": 7}'),
    "manifest gone": lambda at: (at / "manifest.json").unlink(),
    "manifest a folder": lambda at: ((at / "manifest.json").unlink(), (at / "manifest.json").mkdir()),
    "manifest names a file outside": lambda at: (at / "manifest.json").write_text('{"../../x": "0"}'),
    "shard cut": lambda at: (at / "state/shard").write_text("weig"),
    "shard empty": lambda at: (at / "state/shard").write_text(""),
    "shard gone": lambda at: (at / "state/shard").unlink(),
    "shard flipped": lambda at: (at / "state/shard").write_text("weights of 7"),
    "state gone": lambda at: shutil.rmtree(at / "state"),
    "trainer cut": lambda at: (at / "trainer.json").write_text('{"st'),
    "everything gone": lambda at: [shutil.rmtree(at), at.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_passed_over_and_named(folder, damage):
    damage(folder.path(6))
    assert newest(folder) == 4
    assert list(folder.damaged) == [6] and folder.damaged[6]
    with pytest.raises(UserError, match="damaged|not a whole checkpoint"):
        folder.read(folder.path(6))


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_all_damaged_is_one_line_that_names_each(folder, damage):
    for step in (2, 4, 6):
        damage(folder.path(step))
    with pytest.raises(UserError, match=r"every checkpoint here is damaged \(step_000006: .*step_000002: ") as refused:
        folder.newest()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("trainer", ["[]", "{}", '{"step": "six"}', "null"])
def test_a_sealed_folder_without_a_state_is_passed_over(folder, trainer, monkeypatch):
    scratch = folder.start(8).parent
    (scratch / "trainer.json").write_text(trainer)
    module.seal(scratch, folder.path(8))
    assert newest(folder) == 6 and "no state of a run" in folder.damaged[8]


def test_foreign_names_are_left_alone_and_mean_nothing(folder):
    root = folder.path(6).parent
    for name in ("step_000008.bak", "step_best", "step_000008_old", "step_8", "step_0000009", "step_", "step_٠٠٠٠٠٩"):
        shutil.copytree(folder.path(6), root / name)
    (root / "step_000009").write_text("a file")
    (root / "notes.txt").write_text("mine")
    assert newest(folder) == 6 and steps_in(root) == whole_steps(root) == [2, 4, 6]
    folder.tidy()
    write(folder, 8)
    assert {"step_000008.bak", "step_best", "step_000008_old", "notes.txt", "step_000009"} <= set(names(folder))
    assert newest(folder) == 8


def test_a_copy_alone_is_no_checkpoint(tmp_path):
    run = RunFolder(tmp_path)
    (run.checkpoints / "step_000008.bak").mkdir(parents=True)
    assert not run.has_checkpoints()
    (run.checkpoints / "step_000008").mkdir()
    assert run.has_checkpoints()


def test_what_a_killed_run_left_is_gone(folder):
    """Half written, half pruned by this version and by older ones."""
    root = folder.path(6).parent
    for name in (".writing_000005", ".writing_000007", ".pruned_000002", ".step_000002.old-77"):
        (root / name / "state").mkdir(parents=True)
    shutil.copytree(folder.path(2), root / ".pruned_000001")
    (folder.path(2) / "manifest.json").unlink()
    folder.tidy()
    assert names(folder) == ["step_000004", "step_000006"] and newest(folder) == 6


def test_a_checkpoint_between_two_renames_is_not_lost(folder):
    """Killed after the old folder was put aside: the new one is taken, without it the old one."""
    root = folder.path(6).parent
    os.rename(folder.path(6), root / ".step_000006.old-77")
    shutil.copytree(root / ".step_000006.old-77", root / ".writing_000006")
    folder.tidy()
    assert names(folder) == ["step_000002", "step_000004", "step_000006"] and newest(folder) == 6
    os.rename(folder.path(6), root / ".step_000006.old-77")
    (root / ".writing_000006" / "state").mkdir(parents=True)
    folder.tidy()
    assert names(folder) == ["step_000002", "step_000004", "step_000006"] and newest(folder) == 6


def test_half_a_checkpoint_is_kept_where_nothing_better_is(folder):
    for step in (2, 4, 6):
        (folder.path(step) / "manifest.json").unlink()
    folder.tidy()
    assert names(folder) == ["step_000002", "step_000004", "step_000006"]


@pytest.mark.parametrize("killed_at", range(6))
def test_a_death_while_pruning(folder, killed_at, monkeypatch):
    """Dies at each operation of `finish` on the disk: the next start finds the newest whole one, and nothing else."""
    left = [killed_at]

    def dying(function):
        def call(*arguments, **options):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return function(*arguments, **options)

        return call

    (folder.start(8) / "shard").write_text("weights of 8")
    with monkeypatch.context() as patched:
        for name in ("replace", "rename", "unlink", "rmdir"):
            patched.setattr(os, name, dying(getattr(os, name)))
        try:
            folder.finish(8, {"step": 8})
        except KeyboardInterrupt:
            pass
    folder.tidy()
    assert newest(folder) == 8 and folder.damaged == {}
    assert all(name.startswith("step_") for name in names(folder))


def test_a_disk_with_too_little_room_is_refused_before(folder, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 20))
    with pytest.raises(RunError, match=r"no room for the checkpoint of step 8: 0\.0 MiB are free .* from step 6"):
        folder.start(8)
    assert newest(folder) == 6


OF_TORCH = "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"  # its report of a full tmpfs


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:783] ... No space left on device"),
        RuntimeError("basic_ios::clear: iostream error"),  # torch.save to a path
        # as a full tmpfs was reported by torch
        CheckpointException(
            "", {0: (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), None)}
        ),
    ],
)
def test_a_disk_that_becomes_full_is_one_line(folder, error):
    with pytest.raises(RunError, match=r"became full while the checkpoint of step 8 .* goes on from step 6") as refused:
        with folder.disk_errors(8):
            raise error
    assert "\n" not in str(refused.value) and newest(folder) == 6
    with pytest.raises(KeyError), folder.disk_errors(8):
        raise KeyError("other errors stay what they are")


@pytest.mark.skipif("os.geteuid() != 0", reason="mounting needs root")
@pytest.mark.process
def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 1 MiB in memory: the third checkpoint does not fit, the first two stay."""
    import subprocess

    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        folder = CheckpointFolder(tmp_path, keep=9)
        for step in (2, 4):
            (folder.start(step) / "shard").write_bytes(bytes(400_000))
            folder.finish(step, {"step": step})
        with pytest.raises(RunError, match="no room for the checkpoint of step 6"):
            folder.start(6)
        folder.path(2).joinpath("state/shard").unlink()
        filler = tmp_path / "filler"
        filler.write_bytes(bytes(450_000))
        folder.path(4).joinpath("state/shard").write_bytes(bytes(1))
        with pytest.raises(RunError, match="became full while the checkpoint of step 6"), folder.disk_errors(6):
            (folder.start(6) / "shard").write_bytes(bytes(10**6))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_the_next_line_of_metrics_names_the_damaged(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.note(damaged_checkpoints=[8])
    for step in (6, 7):
        with metrics.step(step):
            pass
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("damaged_checkpoints") for line in lines] == [[8], None]


def test_the_fault_names_the_file(folder):
    (folder.path(6) / "state/shard").unlink()
    assert fault_of(folder.path(6)) == "state/shard is missing"
    assert fault_of(folder.path(4)) is None
