"""The batch script as bash runs it, with Slurm's commands and the interpreter replaced by small scripts.

A real Slurm is in tests/slurm. Not covered: which processes a cluster's Slurm signals, containers, GPUs.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from owpo_megatron.config import Config
from owpo_megatron.launch.job import Job
from owpo_megatron.launch.render import render_sbatch
from owpo_megatron.launch.slurm.cluster import submit

pytestmark = pytest.mark.process

# srun: drop the options, run the command once, as the first node. The others answer or record their arguments.
COMMANDS = {
    "srun": """#!/bin/bash
trap '' TERM # srun hands the signal on; here the test sends it to the task itself
while [[ $1 == -* ]]; do shift; done
SLURM_NODEID=0 SLURM_PROCID=0 "$@" &
echo $! >>"$FAKES/tasks"
wait $!
""",
    "scontrol": """#!/bin/bash
case "$*" in
"show hostnames"*) echo n0 ;;
"show node"*) echo "NodeName=n0 NodeAddr=127.0.0.1 NodeHostName=n0" ;;
requeue*) echo "$*" >>"$FAKES/requeues" ;;
esac
""",
    "squeue": '#!/bin/bash\necho "$*" >>"$FAKES/looked"; cat "$FAKES/state"\n',
}
PYTHON = """#!/bin/bash
[[ $1 == -c ]] && exit {importable}
echo "$MASTER_PORT" >"$FAKES/port"
trap '' TERM
touch "$FAKES/ranks"
for ((tick = 0; tick < 600; tick++)); do
    [[ -e $STOP ]] && {{ touch "$FAKES/saved"; exit 0; }}
    [[ -e $FAKES/fail ]] && exit 1
    sleep 0.05
done
"""


class Script:
    """A rendered job in a folder of its own."""

    def __init__(self, folder: Path, importable: int = 0, seeds: tuple[int, ...] = (), **launch: Any):
        self.fakes, self.folder = folder / "fakes", folder
        self.fakes.mkdir()
        for name, text in (COMMANDS | {"python": PYTHON.format(importable=importable)}).items():
            (self.fakes / name).write_text(text)
            (self.fakes / name).chmod(0o755)
        (self.fakes / "state").write_text("RUNNING\n")
        raw = {"model": {"path": "m"}, "data": {"source": "task:cipher"}, "name": "a"}
        launch = {"gpus_per_node": 0, "python": str(self.fakes / "python")} | launch
        engine = {"urls": ["http://127.0.0.1:1"]}
        job = Job(
            Config.build(raw | {"launch": launch, "engine": engine, "runs_dir": str(folder)}), folder, seeds=seeds
        )
        for name in ("a", *(f"a-seed{seed}" for seed in seeds)):
            (folder / name).mkdir()
            (folder / name / "config.yaml").touch()
        (folder / "job.sbatch").write_text(render_sbatch(job))

    def start(self, restarts: int = 0) -> subprocess.Popen[str]:
        env = {
            "PATH": f"{self.fakes}:{os.environ['PATH']}",
            "FAKES": str(self.fakes),
            "SLURM_JOB_ID": "7",
            "SLURM_RESTART_COUNT": str(restarts),
            "SLURM_JOB_NODELIST": "n0",
            "SLURM_ARRAY_JOB_ID": "7",
            "SLURM_ARRAY_TASK_ID": "2",
        }
        return subprocess.Popen(["bash", str(self.folder / "job.sbatch")], env=env, stdout=subprocess.PIPE, text=True)

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 30
        while not (self.fakes / name).exists():
            assert time.monotonic() < deadline, f"no {name}"
            time.sleep(0.02)

    def fails_once(self, restarts: int) -> str:
        """Run an attempt whose ranks fail; return the script's output."""
        (self.fakes / "fail").touch()
        return self.start(restarts).communicate(timeout=60)[0]

    def checkpoint(self, step: int) -> None:
        folder = self.folder / "a" / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").touch()


@pytest.mark.parametrize("state", ["RUNNING", "CANCELLED"])
def test_sigterm_saves_and_only_a_preempted_job_is_requeued(tmp_path: Path, state: str) -> None:
    script = Script(tmp_path)
    process = script.start()
    script.wait_for("ranks")
    (script.fakes / "state").write_text(f"{state}\n")
    task = int((script.fakes / "tasks").read_text().split()[-1])
    os.kill(task, signal.SIGTERM)  # as Slurm signals the tasks of a step
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert (script.fakes / "saved").exists() and "stopped and saved" in said
    assert (script.fakes / "requeues").exists() == (state == "RUNNING"), said


def test_the_warning_before_the_time_limit_saves_and_requeues(tmp_path: Path) -> None:
    script = Script(tmp_path)
    process = script.start()
    script.wait_for("ranks")
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=60)[0]
    assert (script.fakes / "saved").exists() and "requeued: continuation (1 of at most 100)" in said


def test_failures_in_a_row_are_bounded_and_a_checkpoint_starts_the_count_anew(tmp_path: Path) -> None:
    script = Script(tmp_path, max_requeues=2)
    script.checkpoint(5)
    assert "requeued: failure (1 of at most 2)" in script.fails_once(0)
    assert "requeued: failure (2 of at most 2)" in script.fails_once(1)
    script.checkpoint(10)
    assert "requeued: failure (1 of at most 2)" in script.fails_once(2)
    assert "requeued: failure (2 of at most 2)" in script.fails_once(3)
    assert "not requeued: failure, and that 2 times before" in script.fails_once(4)
    assert len((script.fakes / "requeues").read_text().splitlines()) == 4


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_ranks_that_fail_while_slurm_ends_the_job_do_not_bring_it_back(tmp_path: Path, state: str) -> None:
    """After scancel the ranks may end with an error, since the engines end at the same time."""
    script = Script(tmp_path)
    (script.fakes / "state").write_text(f"{state}\n")
    assert f"left to Slurm, which has the job as {state}" in script.fails_once(0)
    assert not (script.fakes / "requeues").exists()


def test_a_task_of_an_array_asks_for_itself(tmp_path: Path) -> None:
    """One task has the array's number as its SLURM_JOB_ID, by which squeue and scontrol would take all tasks."""
    script = Script(tmp_path, seeds=(1, 2))
    assert "requeued: failure (1 of at most 3)" in script.fails_once(0)
    assert (script.fakes / "requeues").read_text() == "requeue 7_2\n"
    assert "--jobs=7_2 " in (script.fakes / "looked").read_text()


def test_a_gpu_tool_that_hangs_is_a_node_that_is_not_fit(tmp_path: Path) -> None:
    script = Script(tmp_path, gpus_per_node=1)
    (script.fakes / "nvidia-smi").write_text("#!/bin/bash\ntrap '' TERM\nsleep 600\n")
    (script.fakes / "nvidia-smi").chmod(0o755)
    file = script.folder / "job.sbatch"
    text = file.read_text()
    assert "timeout --signal=KILL 60 nvidia-smi" in text
    file.write_text(text.replace("--signal=KILL 60", "--signal=KILL 1"))
    assert "nvidia-smi fails or hangs" in script.start().communicate(timeout=60)[0]


def test_a_job_around_the_shell_leaves_nothing_to_the_new_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--export=NONE` lets SLURM_* through."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/bash\nenv >{tmp_path}/seen\necho 8\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, value in {"SLURM_MEM_PER_CPU": "4", "SLURM_CONF": "/etc/s.conf", "SLURM_CPU_BIND": "cores"}.items():
        monkeypatch.setenv(name, value)
    assert submit(tmp_path / "job.sbatch", tmp_path) == 8
    assert "SLURM_CPU_BIND=cores" in (tmp_path / "seen").read_text(), "outside of a job they are the user's own"
    monkeypatch.setenv("SLURM_JOB_ID", "6")
    submit(tmp_path / "job.sbatch", tmp_path)
    assert [line for line in (tmp_path / "seen").read_text().splitlines() if line.startswith("SLURM_")] == [
        "SLURM_CONF=/etc/s.conf"
    ]


def test_a_node_that_is_not_fit_is_named(tmp_path: Path) -> None:
    script = Script(tmp_path, importable=1)
    said = script.start().communicate(timeout=60)[0]
    assert f"node {socket.gethostname()} is not fit for the job" in said and "cannot import owpo_megatron" in said
    assert "requeued: failure (1 of at most 3)" in said and not (script.fakes / "ranks").exists()


def test_the_check_can_be_left_out(tmp_path: Path) -> None:
    script = Script(tmp_path, importable=1, health_check=False)
    process = script.start()
    script.wait_for("ranks")
    (script.folder / "a" / "launch" / "stop.7.0").write_text("cancel\n")
    assert "stopped and saved" in process.communicate(timeout=60)[0]
    assert not (script.fakes / "requeues").exists()


def test_the_rendezvous_port_is_a_free_one(tmp_path: Path) -> None:
    """The shell's own choice, asked a hundred times with every second port of a narrow range taken."""
    text = render_sbatch(
        Job(Config.build({"model": {"path": "m"}, "data": {"source": "task:cipher"}, "launch": {}}), tmp_path)
    )
    function = text[text.index("free_port() {") : text.index("MASTER_PORT=")]
    holders = []
    for port in range(27900, 27920, 2):
        holder = socket.socket()
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", port))
        holder.listen()
        holders.append(holder)
    narrow = function.replace("12000 + RANDOM % 16000", "27900 + RANDOM % 20")
    assert narrow != function
    asked = subprocess.run(
        ["bash", "-c", f"{narrow}\nfor ((i = 0; i < 100; i++)); do free_port 127.0.0.1; done"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    for holder in holders:
        holder.close()
    ports = [int(port) for port in asked.stdout.split()]
    assert len(ports) == 100 and all(port % 2 for port in ports)


def test_the_submitters_environment_stays_outside(tmp_path: Path) -> None:
    """The options of sbatch, and those with which srun passes on what the script itself exports."""
    script = Script(tmp_path, env={"NCCL_SOCKET_IFNAME": "ib0"})
    text = (script.folder / "job.sbatch").read_text()
    assert "#SBATCH --export=NONE" in text and "STEP=(srun --export=ALL" in text
    assert text.index("unset SLURM_EXPORT_ENV") < text.index("srun --export=ALL")
    assert text.index("#SBATCH --export=NONE") < text.index("set -uo pipefail")
    assert "--kill-on-bad-exit=1" in text and "export NCCL_SOCKET_IFNAME=ib0" in text
