"""A process of `owpo bench step`: a line on a pipe starts each of its steps."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil

from owpo_megatron.bench.processes import cpu_seconds, peak_bytes
from owpo_megatron.errors import RunError


class Side:
    """A process whose steps are started by lines on a pipe."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], folder: Path, log: Path, waits_first: bool):
        self._name, self._process, self._log = name, process, log
        self._peaks: dict[str, int] = {}
        self._fresh = not waits_first
        self._go_path, self._done_path = pipes(folder, name)
        self._done: TextIO | None = None
        self._go: TextIO | None = None

    def step(self) -> dict[str, Any]:
        """Its line of a step, with `wall`, the seconds, and `cpu`, those of all its processes."""
        cpu = self._cpu_seconds()
        start = time.perf_counter()
        if self._go is None:
            self._done = self._open(self._done_path, "r")
            self._go = self._open(self._go_path, "w")
            if not self._fresh:
                self._tell()
        else:
            self._tell()
        assert self._done is not None
        text = self._done.readline()
        wall = time.perf_counter() - start
        if not text:
            raise RunError(f"{self._name} ended: {_tail(self._log)}")
        self._note_peaks()
        return json.loads(text) | {"wall": wall, "cpu": self._cpu_seconds() - cpu}

    def peaks(self) -> dict[str, int]:
        """Peak resident bytes of the largest process of each kind, as "SIDE: KIND"."""
        return self._peaks

    def _tell(self) -> None:
        assert self._go is not None
        self._go.write("go\n")
        self._go.flush()

    def _open(self, path: Path, mode: str) -> TextIO:
        """Open a pipe, whose other end a process that died will never open."""
        opened: list[Any] = []
        thread = threading.Thread(target=lambda: opened.append(path.open(mode)), daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.1)
            if self._process.poll() is not None:
                raise RunError(f"{self._name} ended before its first step: {_tail(self._log)}")
        pipe: TextIO = opened[0]
        return pipe

    def _cpu_seconds(self) -> float:
        return sum(cpu_seconds(self._process.pid).values())

    def _note_peaks(self) -> None:
        for name, peak in peak_bytes(self._process.pid).items():
            name = f"{self._name}: {name}"
            self._peaks[name] = max(peak, self._peaks.get(name, 0))


def pipes(folder: Path, name: str, make: bool = False) -> tuple[Path, Path]:
    go, done = folder / f"{name}.go", folder / f"{name}.done"
    if make:
        os.mkfifo(go)
        os.mkfifo(done)
    return go, done


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave no process of it behind."""
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in tree:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        process.wait()


def _tail(log: Path) -> str:
    for file in sorted(log.parent.glob("error_rank_*.txt")):
        log = file
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    return lines[-1] if lines else f"no reason in {log}"
