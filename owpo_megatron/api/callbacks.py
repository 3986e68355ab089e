"""Callbacks of a run in the process that called `train`: called with what the run writes down, able to stop it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from owpo_megatron.errors import CallbackError
from owpo_megatron.run.layout import RunFolder, step_name, whole_steps


class Callback(Protocol):
    """An object with any of these methods. One that returns True asks the run to stop after the step under way."""

    def on_step(self, line: dict[str, Any]) -> bool | None:
        """The metrics line of a finished step (docs/metrics.md)."""

    def on_evaluation(self, step: int, scores: dict[str, Any]) -> bool | None: ...

    def on_checkpoint(self, step: int, folder: Path) -> bool | None: ...

    def on_end(self, result: Any) -> None:
        """The RunResult, also of a run that was stopped."""


class Callbacks:
    """Implements Sink over callbacks. The first error of one is kept and asks for a stop; no callback is called again.

    Args:
        stop: called once, when the run shall stop.
    """

    def __init__(self, callbacks: Sequence[Any], stop: Callable[[], None] = lambda: None):
        self._callbacks = callbacks
        self._stop = stop
        self.wants_stop = False
        self._error: tuple[str, Exception] | None = None

    def step(self, line: dict[str, Any]) -> None:
        self._call("on_step", line)

    def evaluation(self, step: int, scores: dict[str, Any]) -> None:
        self._call("on_evaluation", step, scores)

    def checkpoint(self, step: int, folder: Path) -> None:
        self._call("on_checkpoint", step, folder)

    def end(self, result: Any) -> None:
        """Call on_end.

        Raises:
            CallbackError: a callback has failed; the run is stopped and saved.
        """
        self._call("on_end", result)
        if self._error is not None:
            name, error = self._error
            what = f"{name} raised {type(error).__name__}: {error}"
            raise CallbackError(f"{what}; the run was saved and stopped") from error

    def on_stop(self, stop: Callable[[], None]) -> None:
        """Set the function that asks for a stop."""
        self._stop = stop

    def _call(self, method: str, *arguments: Any) -> None:
        for callback in self._callbacks:
            function = getattr(callback, method, None)
            if function is None or self._error is not None:
                continue
            try:
                answer = function(*arguments)
            except Exception as error:
                self._error = f"{type(callback).__name__}.{method}", error
                answer = True
            if answer is True and not self.wants_stop:
                self.wants_stop = True
                self._stop()


class FolderWatch:
    """Hands a run's lines and checkpoints to callbacks as they appear in its folder: for ranks in other processes.

    What is there when it is made counts as handed out. A resumed run writes the file anew without the lines of the
    steps that it trains again; lines of the new file that were in the old one are not handed out twice.
    """

    def __init__(self, folder: RunFolder, callbacks: Callbacks):
        self._folder = folder
        self._callbacks = callbacks
        self._seen: set[str] = set()
        self._steps = set(whole_steps(folder.checkpoints))
        self._file, self._offset = 0, 0
        self._fresh()

    def look(self) -> bool:
        """Hand out what is new; True once a callback asks for a stop."""
        for text in self._fresh():
            line = json.loads(text)
            if "eval" in line:
                self._callbacks.evaluation(line["step"], line["eval"])
            else:
                self._callbacks.step(line)
        for step in whole_steps(self._folder.checkpoints):
            if step not in self._steps:
                self._steps.add(step)
                self._callbacks.checkpoint(step, self._folder.checkpoints / step_name(step))
        return self._callbacks.wants_stop

    def _fresh(self) -> list[str]:
        """Whole lines that were not there before."""
        try:
            file = self._folder.metrics.open("rb")
        except FileNotFoundError:
            return []
        with file:
            number = os.fstat(file.fileno()).st_ino
            if number != self._file:
                self._file, self._offset = number, 0
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        fresh = [text for text in whole.decode().splitlines() if text not in self._seen]
        self._seen.update(fresh)
        return fresh
