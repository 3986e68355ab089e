"""The environment of the task `lookup`, which shows from outside that an episode is under way."""

from __future__ import annotations

import time
from pathlib import Path

from owpo_megatron.environments.lookup import Lookup


class MarkedLookup(Lookup):
    """Appends a byte to the file `mark` at every step of an episode.

    Args:
        seconds: that a step takes.
    """

    def __init__(self, mark: str, seconds: float = 0.0):
        self._mark, self._seconds = Path(mark), seconds

    def step(self, reply: str):  # type: ignore[no-untyped-def]
        with self._mark.open("ab") as file:
            file.write(b".")
        time.sleep(self._seconds)
        return super().step(reply)
