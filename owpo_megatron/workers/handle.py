"""A rollout worker's process, in the hands of the rank that started it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from owpo_megatron.launched import own_environment

STOP_GRACE = 5.0  # seconds for a worker to end by itself


class WorkerProcess:
    """Starts a worker, which connects to global rank 0. It ends when it is closed, and when this process ends.

    Args:
        address: host and port where rank 0 listens.
        key: proves to both sides that the other one is of this run; never an argument that others can read.
        log: file for what the worker prints.
    """

    def __init__(self, index: int, address: tuple[str, int], key: bytes, log: Path):
        log.parent.mkdir(parents=True, exist_ok=True)
        host, port = address
        # one thread for numpy and torch: the ranks have the cores; no GPU, whose context costs memory
        env = own_environment() | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "owpo_megatron.workers.process", host, str(port), str(index)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=os.getcwd(),
            )
        assert self.process.stdin is not None
        self.process.stdin.write(key.hex().encode() + b"\n")
        self.process.stdin.flush()

    def close(self) -> None:
        """Let the worker end, or end it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(STOP_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
