"""Our side of `owpo bench step`: a rank of a run that waits for a line on a pipe before each step after the first.

python -m owpo_megatron.launch.rank LOGS owpo_megatron.bench.step_rank CONFIG GO DONE
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from owpo_megatron.config import Config


class Gate:
    """Implements Sink: reports a finished step on one pipe and waits on the other for the next."""

    def __init__(self, go: Path, done: Path):
        self._paths = (go, done)
        self._pipes: tuple[TextIO, TextIO] | None = None

    def open(self) -> None:
        go, done = self._paths
        answers = done.open("w")
        self._pipes = (go.open(), answers)

    def step(self, line: Mapping[str, Any]) -> None:
        if self._pipes is None:
            self.open()
        assert self._pipes is not None
        go, done = self._pipes
        done.write(json.dumps(line) + "\n")
        done.flush()
        go.readline()

    def evaluation(self, step: int, scores: Mapping[str, Any]) -> None: ...

    def checkpoint(self, step: int, folder: Path) -> None: ...


def main(config_file: Path, go: Path, done: Path) -> None:
    from owpo_megatron.trainer.given import Given
    from owpo_megatron.trainer.train import train_run

    train_run(Config.load(config_file), given=Given(sinks=[Gate(go, done)]))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as trainer/main.py does, and for its reason
