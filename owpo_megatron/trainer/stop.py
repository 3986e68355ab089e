"""A stop that loses nothing: SIGTERM, SIGINT and a stop file let the step finish, save, and end with exit code 0."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Notes the signal; every rank asks at the same point of the loop, and all stop when one was told to.

    Args:
        any_rank: gives True on all ranks when the argument is True on one (collective).
        file: its existence asks for a stop, too: a cluster's job script reaches ranks on other nodes by no signal
            that torchrun would not answer by ending them. One rank looking is enough.
    """

    def __init__(self, any_rank: Callable[[bool], bool], file: Path | None = None):
        self._any_rank = any_rank
        self._file = file
        self._told = False
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def requested(self) -> bool:
        return self._any_rank(self._told or (self._file is not None and self._file.exists()))
