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
RESTART_SECONDS = 1.0  # before the first restart, twice as long before each further one


class WorkerProcess:
    """Starts a worker, which connects to global rank 0. It ends when it is closed, and when this process ends.

    One that ends otherwise is started again. The reason goes to rank 0, which ends the run where a worker has never
    been ready.

    Args:
        address: host and port where rank 0 listens.
        key: proves to both sides that the other one is of this run; never an argument that others can read.
        log: file for what the worker prints.
        restarts: how often it is started again.
    """

    def __init__(self, index: int, address: tuple[str, int], key: bytes, log: Path, restarts: int = 3):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._index, self._address, self._key, self._log, self._restarts = index, address, key, log, restarts
        self._closed = threading.Event()
        self._changes = threading.Lock()
        self.process = self._started()
        """The worker's process, another one after a restart."""
        threading.Thread(target=self._watch, name="rollout-worker", daemon=True).start()

    def close(self) -> None:
        """Let the worker end, or end it."""
        with self._changes:
            self._closed.set()
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(STOP_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        host, port = self._address
        with self._log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "owpo_megatron.workers.process", host, str(port), str(self._index)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(),
                bufsize=0,
            )
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already
            process.stdin.write(self._key.hex().encode() + b"\n")
        return process

    def _watch(self) -> None:
        for restart in range(self._restarts + 1):
            status = self.process.wait()
            if not status or self._closed.is_set():
                return
            with suppress(OSError, EOFError, AuthenticationError):  # rank 0 has ended, or is out of reach for both
                self._report(status)
            if restart == self._restarts or self._closed.wait(RESTART_SECONDS * 2**restart):
                return
            with self._changes:
                if self._closed.is_set():
                    return
                assert self.process.stdin is not None
                self.process.stdin.close()
                self.process = self._started()

    def _report(self, status: int) -> None:
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
