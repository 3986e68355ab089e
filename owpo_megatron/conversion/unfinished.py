"""A folder in the making: hidden beside its final name, remembered part by part, renamed when it is whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from owpo_megatron.errors import UserError
from owpo_megatron.run.files import put_in_place, take_lock, write_whole

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
        self._lock_file = self.path.with_name(f"{self.path.name}.lock")

    def __enter__(self) -> Unfinished:
        try:
            self.journal.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError("out", self._folder, f"{error.strerror}; give a folder that can be written to") from error
        lock = take_lock(self._lock_file)
        if lock is None:
            raise UserError("out", self._folder, "another process is making it; wait for it or stop it")
        self._lock = lock
        if self._read("plan") != self._plan:
            self.start_over()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock_file.unlink(missing_ok=True)
        os.close(self._lock)

    def start_over(self) -> None:
        """Forget every part."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.journal.mkdir(parents=True)
        self.mark("plan", self._plan)

    def record(self, part: str) -> Any:
        """Return the record that `mark` received for this part, in this attempt or an earlier one; None without one."""
        return self._read(part)

    def mark(self, part: str, record: Any) -> None:
        """Mark this part as written; the record contains what finishing needs."""
        write_whole(self.journal / f"{part}.json", json.dumps(record))

    def discard(self) -> None:
        """Remove what was made."""
        shutil.rmtree(self.path, ignore_errors=True)

    def finish(self) -> None:
        """Everything to the disk, then the final name; between two renames an overwritten folder is briefly absent."""
        shutil.rmtree(self.journal)
        put_in_place(self.path, self._folder)

    def _read(self, part: str) -> Any:
        file = self.journal / f"{part}.json"
        return json.loads(file.read_text()) if file.is_file() else None
