"""`owpo launch` as a user runs it, and the job that comes of it: its processes, its end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from owpo import Owpo, write_config

from owpo_megatron.launch.slurm.cluster import JobState
from owpo_megatron.launch.slurm.record import latest


class Launched:
    """A run that `owpo launch` starts, maybe several times."""

    def __init__(self, here: Path, name: str, *layers: dict[str, Any]):
        self.here = here
        self.config = write_config(here / f"{name}.yaml", *layers, {"name": name})
        self.run_dir = Path(layers[0]["runs_dir"]) / name

    def submit(self, *flags: str) -> int:
        """Returns the number of the last job."""
        Owpo(self.here, "launch", "-c", str(self.config), *flags).done(timeout=300)
        return latest(self.run_dir).jobs[-1]

    def states(self) -> list[JobState]:
        return latest(self.run_dir).states()

    def wait_until(self, condition: Callable[[], Any], what: str, timeout: float = 400) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {timeout} s: {self.told()}"
            time.sleep(0.05)

    def wait_for_end(self, timeout: float = 600) -> list[str]:
        """Waits for every job; returns their states."""
        deadline = time.monotonic() + timeout
        while not all(state.ended for state in self.states()):
            assert time.monotonic() < deadline, f"no end within {timeout} s: {self.told()}"
            time.sleep(0.2)
        return [state.state for state in self.states()]

    def words(self) -> str:
        """Return the output of the jobs' scripts."""
        return "".join(Path(file).read_text() for file in latest(self.run_dir).outputs if Path(file).exists())

    def told(self) -> str:
        return f"{self.states()}\n{self.words()[-4000:]}"


def processes(job: int) -> list[psutil.Process]:
    """Every living process of a job on this machine."""
    found = []
    for process in psutil.process_iter():
        try:
            env = process.environ()
            if env.get("SLURM_JOB_ID") == str(job) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue  # it ended meanwhile
    return found


def kill_rank(job: int, rank: int) -> None:
    for process in processes(job):
        try:
            words = process.cmdline()
            is_rank = "owpo_megatron.launch.rank" in words and "torch.distributed.run" not in words
            if is_rank and process.environ().get("RANK") == str(rank):
                os.kill(process.pid, signal.SIGKILL)
        except psutil.Error:
            continue
