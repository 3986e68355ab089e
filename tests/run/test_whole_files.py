"""Files and folders that appear whole or not at all, and locks. A power cut is not covered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from owpo_megatron.run.files import locked, put_in_place, take_lock, whole_file, write_whole


def test_a_file_is_replaced_at_the_end_of_the_block(tmp_path: Path) -> None:
    file = tmp_path / "new" / "scores.json"
    write_whole(file, "old")
    with whole_file(file, durable=True) as scratch:
        scratch.write_text("half")
        assert file.read_text() == "old"
        scratch.write_text("whole")
    assert file.read_text() == "whole" and os.listdir(file.parent) == ["scores.json"]


def test_an_error_leaves_the_old_file_and_no_scratch(tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    write_whole(file, b"old")
    with pytest.raises(RuntimeError), whole_file(file) as scratch:
        scratch.write_text("half")
        raise RuntimeError
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == ["scores.json"]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_takes_its_final_name_and_replaces_the_old_one(tmp_path: Path, exists: bool) -> None:
    folder, scratch = tmp_path / "step", tmp_path / ".writing"
    (scratch / "state").mkdir(parents=True)
    (scratch / "state" / "shard").write_text("new")
    (scratch / "link").symlink_to("state")
    if exists:
        folder.mkdir()
        (folder / "stale").write_text("old")
    put_in_place(scratch, folder)
    assert os.listdir(tmp_path) == ["step"]
    assert sorted(os.listdir(folder)) == ["link", "state"] and (folder / "state" / "shard").read_text() == "new"


def test_one_holder_of_a_lock_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path / ".lock") as first, locked(tmp_path / ".lock") as second:
        assert first is not None and second is None
    with locked(tmp_path / ".lock") as again:
        assert again is not None


@pytest.mark.process
def test_a_lock_stays_while_a_child_process_holds_it(tmp_path: Path) -> None:
    """The launcher's lock is passed on to its ranks: the folder stays locked until they have ended too."""
    lock = take_lock(tmp_path / ".lock")
    assert lock is not None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    os.close(lock)
    assert take_lock(tmp_path / ".lock") is None
    child.communicate(b"\n")
    freed = take_lock(tmp_path / ".lock")
    assert freed is not None
    os.close(freed)
