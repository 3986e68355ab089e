"""Runs of the trainer on forked ranks, where the test is not about the `owpo` command: nothing is imported anew.

The ranks enter where the command starts them, in `trainer.main`. What the command adds (its checks before the start,
the run folder's lock, one line for a failure, signals passed on) is left out; tests of these start the command itself
(owpo.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rank_pool import Job, Ranks

from owpo_megatron.config import Config


def train(ranks: Ranks, file: Path, *overrides: str, timeout: float = 300) -> str:
    """Train to the end what a configuration file describes; returns what rank 0 printed."""
    return WarmRun(ranks, file, *overrides).done(timeout)


def train_all(ranks: Ranks, files: list[Path], timeout: float = 600) -> None:
    """Several runs of one rank, one after the other in one process."""
    for file in files:
        _keep_config(Config.load(file))
    ranks.run(1, _train_files, [str(file) for file in files], timeout=timeout)


class WarmRun:
    """A run that is going on: watched, killed, or waited for. The counterpart of owpo.Owpo."""

    def __init__(self, ranks: Ranks, file: Path, *overrides: str):
        config = Config.load(file, list(overrides))
        self.job: Job = ranks.start(config.parallel.world_size, _train, str(_keep_config(config)))

    @property
    def stdout(self) -> str:
        return self.job.output

    def told(self) -> str:
        return self.stdout[-3000:]

    def wait_until(self, condition: Callable[[], Any], what: str, timeout: float = 120, every: float = 0.02) -> None:
        """Wait for a condition; the run must not end before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.job.is_running(), f"ended before {what}: {self.told()}"
            assert time.monotonic() < deadline, f"no {what} within {timeout} s: {self.told()}"
            time.sleep(every)

    def kill(self) -> None:
        self.job.kill()

    def done(self, timeout: float = 300) -> str:
        """Return rank 0's output, after all ranks have ended well."""
        self.job.results(timeout)
        return self.stdout

    def survivors(self) -> list[str]:
        """Command lines of ranks that still run."""
        return [rank.log.name for rank in self.job.ranks if rank.process.is_alive()]


def _keep_config(config: Config) -> Path:
    """The resolved configuration in the run's folder, where the command writes it."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    config.save(config.run_dir / "config.yaml")
    return config.run_dir / "config.yaml"


def _train(file: str) -> None:
    from owpo_megatron.trainer.main import main

    code = main(["--config", file])
    assert code == 0, f"the trainer's exit code is {code}"


def _train_files(files: list[str]) -> None:
    for file in files:
        _train(file)
