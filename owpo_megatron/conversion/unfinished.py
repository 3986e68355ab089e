"""A folder in the making: hidden beside its final name, remembered part by part, renamed when it is whole."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from owpo_megatron.errors import UserError

_JOURNAL = ".journal"  # inside the hidden folder; gone before the rename


class Unfinished:
    """The hidden folder `.NAME.partial`, which the next attempt at the same work goes on with.

    Nothing else reads it, so a folder of the final name is always a whole one. One process at a time may work on it.

    Args:
        folder: the final name.
        plan: what the work depends on (source files with sizes and times, dtype ...). A hidden folder of another
            plan is started over.
        overwrite: `finish` replaces an existing folder.

    Raises:
        UserError: `folder` exists and may not be overwritten, or another process is making it.

    Example:
        with Unfinished(out, plan) as work:
            if work.record("00001") is None:
                work.mark("00001", write_part(work.path))
            work.finish()
    """

    def __init__(self, folder: Path, plan: dict[str, Any], overwrite: bool = False):
        if folder.exists() and not overwrite:
            raise UserError("out", folder, "exists already; choose another folder or remove it")
        self._folder = folder
        self._plan = json.loads(json.dumps(plan))
        self.path = folder.with_name(f".{folder.name}.partial")
        self.journal = self.path / _JOURNAL

    def __enter__(self) -> Unfinished:
        try:
            self.journal.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("out", self._folder, f"{error.strerror}; give a folder that can be written to") from error
        self._lock = (self.path.with_name(f"{self.path.name}.lock")).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UserError("out", self._folder, "another process is making it; wait for it or stop it") from error
        if self._read("plan") != self._plan:
            self.start_over()
        return self

    def __exit__(self, *_: object) -> None:
        Path(self._lock.name).unlink(missing_ok=True)
        self._lock.close()

    def start_over(self) -> None:
        """Forget every part."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.journal.mkdir(parents=True)
        self.mark("plan", self._plan)

    def record(self, part: str) -> Any:
        """What `mark` was given for this part, in this attempt or an earlier one; None where it never was."""
        return self._read(part)

    def mark(self, part: str, record: Any) -> None:
        """This part is written; the record says what finishing needs of it."""
        scratch = self.journal / f"{part}.new"
        scratch.write_text(json.dumps(record))
        scratch.replace(self.journal / f"{part}.json")

    def discard(self) -> None:
        """Remove what was made."""
        shutil.rmtree(self.path, ignore_errors=True)

    def finish(self) -> None:
        """Everything to the disk, then the final name; between two renames an overwritten folder is briefly absent."""
        shutil.rmtree(self.journal)
        for file in self.path.rglob("*"):
            _fsync(file)
        _fsync(self.path)
        old = self._folder.with_name(f".{self._folder.name}.old-{os.getpid()}")
        if self._folder.exists():
            self._folder.rename(old)
        self.path.rename(self._folder)
        _fsync(self._folder.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _read(self, part: str) -> Any:
        file = self.journal / f"{part}.json"
        return json.loads(file.read_text()) if file.is_file() else None


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
