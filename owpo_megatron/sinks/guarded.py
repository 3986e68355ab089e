"""A tracker in a thread of its own: it cannot slow a step down, and its failure cannot end a run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from owpo_megatron.sinks.names import scalars

CLOSE_SECONDS = 60.0  # a tracker's last upload; the run ends without it after that


class Tracker(Protocol):
    """Protocol of the trackers. Every method may raise; all, including the constructor, are called in one thread."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by name."""

    def close(self) -> None: ...


class GuardedSink:
    """Implements the trainer's Sink over a tracker. The first error is reported once, and the tracker is left alone.

    Args:
        name: as reported, e.g. "wandb".
        start: makes the tracker; called in the sink's thread, since some of them wait for the network.
        warn: called with the one message.
    """

    def __init__(self, name: str, start: Callable[[], Tracker], warn: Callable[[str], None]):
        self.name = name
        self._start, self._warn = start, warn
        self._queue: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def step(self, line: dict[str, Any]) -> None:
        """The metrics line of a step."""
        step = int(line["step"])
        values = scalars({name: value for name, value in line.items() if name != "step"}, "train/")
        self._put(lambda tracker: tracker.log(step, values))

    def evaluation(self, step: int, scores: dict[str, Any]) -> None:
        values = scalars(scores, "eval/")
        self._put(lambda tracker: tracker.log(step, values))

    def checkpoint(self, step: int, folder: Path) -> None:
        """Trackers get numbers; checkpoints stay where they are."""

    def close(self) -> None:
        """Send what is queued and end; waits at most CLOSE_SECONDS."""
        self._queue.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._report("did not finish within a minute; its last values may be missing")

    def _put(self, call: Callable[[Tracker], None]) -> None:
        if not self._failed.is_set():
            self._queue.put(call)

    def _work(self) -> None:
        try:
            tracker = self._start()
            while (call := self._queue.get()) is not None:
                call(tracker)
            tracker.close()
        except BaseException as error:  # trackers raise SystemExit, too
            self._report(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")

    def _report(self, reason: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            self._warn(f"sink {self.name} failed and gets nothing more; the run continues. {reason}")
