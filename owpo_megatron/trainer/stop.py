"""A stop that loses nothing: the step is finished and saved, and the run ends with exit code 0."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """A request to stop, by signal, file or call; every rank asks at the same point of the loop, and all stop together.

    Args:
        any_rank: gives True on all ranks when the argument is True on one (collective).
        file: its existence asks for a stop, too: a cluster's job script reaches ranks on other nodes by no signal
            that torchrun would not answer by ending them. One rank looking is enough.
    """

    def __init__(self, any_rank: Callable[[bool], bool], file: Path | None = None):
        self._any_rank = any_rank
        self._file = file
        self._wanted = False

    def request(self) -> None:
        self._wanted = True

    def requested(self) -> bool:
        return self._any_rank(self._wanted or (self._file is not None and self._file.exists()))

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT ask for a stop inside the block; the handlers of before are back after it."""

        def note(number: int, frame: FrameType | None) -> None:
            self.request()

        before = {number: signal.signal(number, note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
