"""The report of a failing rank where the disk takes no more bytes. Other reports: tests/cli/test_local_ranks.py."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from owpo_megatron.errors import RunError, UserError
from owpo_megatron.launch.reason import first_reason
from owpo_megatron.trainer.main import SPARE_BYTES, report

ERRORS = {
    "full": (OSError(errno.ENOSPC, "No space left on device", "runs/run/metrics.jsonl"), 1),
    "read-only": (OSError(errno.EROFS, "Read-only file system", "runs/run/metrics.jsonl"), 1),
    "checkpoint": (RunError("the disk at runs/run became full"), 1),
    "mistake": (UserError("parallel.tp", 3, "use a divisor"), 2),
}


@pytest.mark.parametrize(("error", "code"), ERRORS.values(), ids=ERRORS.keys())
@pytest.mark.parametrize("full", [False, True])
def test_a_reason_has_its_place_on_a_full_disk(error: Exception, code: int, full: bool, tmp_path: Path) -> None:
    spare, error_file = tmp_path / ".spare_rank_0", tmp_path / "error_rank_0.txt"
    spare.write_bytes(b"\n" * SPARE_BYTES)
    if full:
        os.symlink("/dev/full", error_file)  # every byte written there is one too many
    assert report(error, error_file, 0, spare) == code
    reason = first_reason(tmp_path)
    assert reason is not None and reason.code == code and "OSError" not in reason.reason
    shown = "runs/run/metrics.jsonl could not be written: " if isinstance(error, OSError) else str(error)
    assert shown in reason.reason and not error_file.is_symlink()


def test_a_disk_that_takes_no_file_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "gone" / "error_rank_0.txt"
    missing.parent.touch()  # a file where the folder was
    assert report(RunError("the disk is gone"), missing, 0, missing.with_name("spare")) == 1
    assert "the disk is gone" in capsys.readouterr().out
