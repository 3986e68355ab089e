"""A real Slurm of three nodes on this machine (tools/slurm_lab.sh) for the session; skipped where none can run."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import record_rollouts
from owpo import ROOT

from owpo_megatron.config import Config

LAB = ROOT / "tools" / "slurm_lab.sh"
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))


class Lab:
    """The lab's environment, and nodes that die and come back."""

    def __init__(self, env: dict[str, str]):
        self.env = env

    def command(self, *words: str) -> str:
        done = subprocess.run([str(LAB), *words], env=self.env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def node_dies(self, node: str) -> None:
        self.command("fail", node)

    def node_is_back(self, node: str) -> None:
        self.command("back", node)


def free_ports(count: int) -> int:
    """The first of so many free ports in a row, below those that jobs and engines take."""
    for first in random.sample(range(10000, 12000 - count), 200):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root; the tests of tests/slurm run as root only")
    if shutil.which("slurmctld") is None or shutil.which("slurmd") is None:
        pytest.skip("no Slurm here; `make slurm` installs Debian's (as root, on Debian or Ubuntu)")
    # a short path: Slurm's sockets lie below it
    folder = tmp_path_factory.mktemp("lab")
    env = os.environ | {"LAB": str(folder), "CTLD_PORT": str(free_ports(4)), "SLURM_CONF": str(folder / "slurm.conf")}
    started = subprocess.run([str(LAB), "up"], env=env, capture_output=True, text=True, timeout=300)
    if started.returncode:
        subprocess.run([str(LAB), "down"], env=env, capture_output=True, timeout=300)
        pytest.skip(f"Slurm does not start here: {started.stderr.strip().splitlines()[-1:]}")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = env["SLURM_CONF"]
    try:
        yield Lab(env)
    finally:
        subprocess.run([str(LAB), "down"], env=env, capture_output=True, timeout=300)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Sections of a ten-step OWPO run on recorded rollouts, for two nodes with a rank each."""
    from base_model import RECIPES, make_base_model

    here = tmp_path_factory.mktemp("launched")
    model = make_base_model(RECIPES["cipher"], ROOT / "cache" / "base_models")
    raw: dict[str, Any] = {
        "seed": 3,
        "runs_dir": str(here / "runs"),
        "model": {"path": str(model)},
        "data": {"source": "task:cipher", "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 8, "group_size": 4, "max_response_tokens": 8},
        "optimizer": {"steps": 10, "updates_per_step": 2, "lr": 2e-4, "warmup_steps": 4, "tokens_per_microbatch": 128},
        "reference": {"every": 4},
        "parallel": {"tp": 2},
        "eval": {"before": False, "after": False},
        "checkpoint": {"every": 2, "keep": 20},
        "launch": {"nodes": 2, "gpus_per_node": 0},
    }
    record_rollouts(Config.build(raw), here / "recorded", steps=10)
    return raw | {"rollout": raw["rollout"] | {"replay": str(here / "recorded")}}
