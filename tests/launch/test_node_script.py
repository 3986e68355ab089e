"""NeMo-Run's node script as bash runs it on one machine, with a small script for the interpreter.

A real NeMo-Run on a real Slurm is in tests/slurm. Not covered: several nodes, containers, GPUs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from owpo_megatron.config import Config
from owpo_megatron.launch.job import Job
from owpo_megatron.launch.render import render_node

pytestmark = pytest.mark.process

# The engine serves until it gets SIGTERM; the ranks end at the stop file or when they are made to fail.
PYTHON = """#!/bin/bash
case "$*" in
-c*) exit 0 ;;
*serve*)
    trap 'touch "$FAKES/engine_ended"; exit 0' TERM
    touch "$FAKES/engine"
    while :; do sleep 0.05; done
    ;;
esac
echo "$MASTER_PORT" >"$FAKES/port"
touch "$FAKES/ranks"
for ((tick = 0; tick < 600; tick++)); do
    [[ -e $STOP ]] && { touch "$FAKES/saved"; exit 0; }
    [[ -e $FAKES/finish ]] && exit 0
    [[ -e $FAKES/fail ]] && exit 3
    sleep 0.05
done
"""


class Node:
    def __init__(self, folder: Path):
        self.fakes = folder / "fakes"
        self.fakes.mkdir()
        python = self.fakes / "python"
        python.write_text(PYTHON)
        python.chmod(0o755)
        raw = {"name": "a", "runs_dir": str(folder), "model": {"path": "m"}, "data": {"source": "task:cipher"}}
        launch = {"gpus_per_node": 0, "python": str(python)}
        self.script = folder / "node.sh"
        self.script.write_text(render_node(Job(Config.build(raw | {"launch": launch}), folder)))

    def start(self) -> subprocess.Popen[str]:
        env = {"PATH": os.environ["PATH"], "FAKES": str(self.fakes)}
        return subprocess.Popen(["bash", str(self.script)], env=env, stderr=subprocess.PIPE, text=True)

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while not (self.fakes / name).exists():
            assert time.monotonic() < deadline, f"no {name}"
            time.sleep(0.02)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_both_warnings_save_and_ask_for_a_requeue(node: Node, number: int) -> None:
    process = node.start()
    node.wait_for("ranks")
    node.wait_for("engine")
    process.send_signal(number)
    assert process.wait(60) == 75, process.stderr
    assert (node.fakes / "saved").exists() and (node.fakes / "engine_ended").exists(), "engines end after the ranks"


@pytest.mark.parametrize(("file", "code"), [("finish", 0), ("fail", 1)])
def test_the_ranks_end_decides_and_ends_the_engines(node: Node, file: str, code: int) -> None:
    process = node.start()
    node.wait_for("ranks")
    node.wait_for("engine")
    (node.fakes / file).touch()
    assert process.wait(60) == code
    assert (node.fakes / "engine_ended").exists()
    assert 12000 <= int((node.fakes / "port").read_text()) < 28000
