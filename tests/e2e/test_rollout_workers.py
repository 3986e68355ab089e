"""Runs whose responses are asked for and graded by rollout workers: the same bits as without, and as with one fewer.

Real SGLang, real processes. Several nodes are not covered: the workers are on this machine.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from owpo import newest_step, steps_of, without, write_config
from rank_pool import Ranks
from warm import WarmRun, train

pytestmark = [pytest.mark.ranks, pytest.mark.server]

SIXTEEN: dict[str, Any] = {"parallel": {"tp": 2, "pp": 2, "dp": 4}}


def config(small: dict[str, Any], url: str, here: Path, name: str, workers: int, *layers: dict[str, Any]) -> Path:
    own = {"name": name, "engine": {"urls": [url]}, "rollout": {"workers": workers}, "optimizer": {"steps": 4}}
    return write_config(here / f"{name}.yaml", small, own, {"checkpoint": {"export_hf": False}}, *layers)


def lines(small: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [without(line, "workers_lost") for line in steps_of(Path(small["runs_dir"]) / name)]


def worker_processes() -> list[psutil.Process]:
    """The workers of this test's ranks, by index."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "owpo_megatron.workers.process" in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue  # it ended meanwhile
    return sorted(found, key=lambda one: one.cmdline()[-1])


def test_workers_change_no_bit(ranks: Ranks, small: dict[str, Any], server_url: str, tmp_path: Path) -> None:
    """Two ranks with a worker each, which also draw and grade an evaluation, against rank 0 alone."""
    for count in (0, 2):
        layers = {"parallel": {"dp": 2}}, {"eval": {"after": True, "limit": 16, "samples": 2, "pass_at": [1, 2]}}
        train(ranks, config(small, server_url, tmp_path, f"workers_{count}", count, *layers))
    assert len(lines(small, "workers_0")) == 4
    assert lines(small, "workers_2") == lines(small, "workers_0")


@pytest.mark.extra
def test_sixteen_ranks_lose_a_worker(ranks: Ranks, small: dict[str, Any], server_url: str, tmp_path: Path) -> None:
    """Workers on four of them; one is killed after the first step, and the run goes on to the same end."""
    train(ranks, config(small, server_url, tmp_path, "sixteen", 4, SIXTEEN), timeout=900)
    run = WarmRun(ranks, config(small, server_url, tmp_path, "killed", 4, SIXTEEN))
    run.wait_until(lambda: newest_step(Path(small["runs_dir"]) / "killed") >= 1, "step 1", timeout=600)
    workers = worker_processes()
    assert [process.cmdline()[-1] for process in workers] == ["0", "1", "2", "3"]
    assert len({process.ppid() for process in workers}) == 4, "each belongs to a rank of its own"
    os.kill(workers[2].pid, signal.SIGKILL)
    said = run.done(900)
    assert "rollout worker 2 is lost (its process has ended); its responses go to the other 3" in said
    found = steps_of(Path(small["runs_dir"]) / "killed")
    assert sum(line.get("workers_lost", 0) for line in found) == 1
    assert lines(small, "killed") == lines(small, "sixteen") and len(found) == 4
    assert found[-1]["weights"], "lines have the weights' digest"
