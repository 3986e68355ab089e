"""Folders of this process alone. Where it is killed the next one clears them away: on a tmpfs they are memory."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_PREFIX, _LOCK = "owpo-weights-", ".lock"


class PrivateFolder:
    """A new folder that its owner alone may read; those of dead processes beside it are removed.

    Args:
        parent: made where it does not exist.
    """

    def __init__(self, parent: Path):
        parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(parent)
        made = Path(tempfile.mkdtemp(prefix=".owpo-new-", dir=parent))
        self._lock = _lock(made)
        assert self._lock is not None, made
        self.path = made.rename(parent / made.name.replace(".owpo-new-", _PREFIX))  # it has this name only once locked

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _clear_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            lock = _lock(folder)
        except OSError:  # another user's, or gone by now
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """The folder's lock, held until it is closed or this process ends; None where somebody has it."""
    opened = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        return None
    return opened
