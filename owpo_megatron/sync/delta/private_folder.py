"""Folders private to this process. If it is killed, the next one removes them: on a tmpfs they are memory."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from owpo_megatron.run.files import take_lock

_PREFIX, _LOCK = "owpo-weights-", ".lock"


class PrivateFolder:
    """A new folder readable by its owner alone; folders of dead processes next to it are removed.

    Args:
        parent: folder to create it in; created if it does not exist.
    """

    def __init__(self, parent: Path):
        parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(parent)
        made = Path(tempfile.mkdtemp(prefix=".owpo-new-", dir=parent))
        self._lock = take_lock(made / _LOCK)
        assert self._lock is not None, made
        self.path = made.rename(parent / made.name.replace(".owpo-new-", _PREFIX))  # gets this name only once locked

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _clear_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            lock = take_lock(folder / _LOCK)
        except OSError:  # another user's, or already gone
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
