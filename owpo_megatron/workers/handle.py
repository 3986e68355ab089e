"""A rollout worker's process, in the hands of the rank that started it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import closing, suppress
from multiprocessing import AuthenticationError
from pathlib import Path

from owpo_megatron.errors import printable
from owpo_megatron.launched import own_environment
from owpo_megatron.workers.joining import join
from owpo_megatron.workers.messages import Ready

STOP_GRACE = 5.0  # seconds for a worker to end by itself


class WorkerProcess:
    """Starts a worker, which connects to global rank 0. It ends when it is closed, and when this process ends.

    Where it ends before it has connected, the reason goes to rank 0.

    Args:
        address: host and port where rank 0 listens.
        key: proves to both sides that the other one is of this run; never an argument that others can read.
        log: file for what the worker prints.
    """

    def __init__(self, index: int, address: tuple[str, int], key: bytes, log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._index, self._address, self._key, self._log = index, address, key, log
        self._closed = False
        host, port = address
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "owpo_megatron.workers.process", host, str(port), str(index)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(),
                bufsize=0,
            )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.write(key.hex().encode() + b"\n")
        threading.Thread(target=self._watch, name="rollout-worker", daemon=True).start()

    def close(self) -> None:
        """Let the worker end, or end it."""
        assert self.process.stdin is not None
        self._closed = True
        self.process.stdin.close()
        try:
            self.process.wait(STOP_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _watch(self) -> None:
        status = self.process.wait()
        if status and not self._closed:
            with suppress(
                OSError, EOFError, AuthenticationError
            ):  # rank 0 has ended, or cannot be reached, as by the worker itself
                with closing(join(self._address, self._key, self._index)) as connection:
                    connection.recv()
                    connection.send(Ready(f"its process ended with status {status}{self._last_words()}"))

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return f": {printable(lines[-1].strip())}" if lines else ""


def _environment() -> dict[str, str]:
    """The rank's import path, with which files of the working directory shadow nothing; one thread for numpy and
    torch, as the ranks have the cores; no GPU, whose context costs memory."""
    return own_environment() | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
