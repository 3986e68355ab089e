"""Starts the ranks of the doctor, on this machine or by srun on several nodes, and takes over what they found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from owpo_megatron.doctor.finding import Finding, Scope
from owpo_megatron.errors import UserError
from owpo_megatron.launch.machine import num_cores, usable_gpus
from owpo_megatron.launched import own_environment

PROBE = "owpo_megatron.doctor.probe"
MAX_LOCAL_RANKS = 8
SECONDS = 180.0
QUEUE_SECONDS = 60  # for which srun may wait for its nodes


def ranks(scope: Scope) -> Iterator[Finding]:
    """Findings of real ranks between them, and on several nodes what each finds by itself."""
    options = ["--json", "--backend", scope.backend]
    if scope.config is not None:
        # by value: another node need not see a file of this one
        options += ["--settings", json.dumps(scope.config.model_dump(mode="json"))]
    reach = scope.nodes > 1 and (scope.reach_nodes or "SLURM_JOB_ID" in os.environ)
    try:
        told, error = _by_srun(scope, options) if reach else _here(scope, [*options, "--between-only"])
    except UserError as mistake:
        yield Finding("ranks", "fail", f"{mistake.field} = {mistake.value}", mistake.remedy)
        return
    if told:
        yield from (Finding(**raw) for raw in told)
        if scope.nodes > 1 and not reach:
            detail = f"the run spreads over {scope.nodes} nodes; ranks were started on this machine alone"
            yield Finding("other nodes", "warn", detail, f"owpo doctor --nodes {scope.nodes}, where jobs are submitted")
    else:
        remedy = "set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to a working interface, e.g. lo on one machine"
        yield Finding("ranks", "fail", error or "they ended without a word", remedy)


def _here(scope: Scope, options: list[str]) -> tuple[list[dict[str, Any]], str]:
    from owpo_megatron.launch.local import free_port

    gpus = len(usable_gpus())
    least, most = (1, gpus) if gpus else (2, max(2, num_cores()))
    world = max(least, min(scope.world_size, most, MAX_LOCAL_RANKS))
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    env = {"OMP_NUM_THREADS": "1", **own_environment(), **meeting}
    command = [sys.executable, "-m", PROBE, *options]
    processes = [_start(command, env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]
    return _outcome(processes, SECONDS)


def _by_srun(scope: Scope, options: list[str]) -> tuple[list[dict[str, Any]], str]:
    """One rank a node; inside an allocation its nodes are used, else srun asks for some.

    Raises:
        UserError: there is no srun here.
    """
    if shutil.which("srun") is None:
        raise UserError(
            "--nodes", scope.nodes, "needs Slurm's srun, which is not here: run it where jobs are submitted"
        )
    command = ["srun", f"--nodes={scope.nodes}", "--ntasks-per-node=1", "--mpi=none"]
    command += ["--overlap"] if "SLURM_JOB_ID" in os.environ else [f"--immediate={QUEUE_SECONDS}"]
    return _outcome([_start([*command, sys.executable, "-m", PROBE, *options])], SECONDS + QUEUE_SECONDS)


def _start(command: list[str], env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _outcome(processes: list[subprocess.Popen[str]], seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Output of rank 0, and the last lines of the first that failed without a finding. None is left behind."""
    deadline = time.monotonic() + seconds
    told: list[dict[str, Any]] = []
    words = []
    try:
        for process in processes:
            stdout, stderr = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            told += [row for line in stdout.splitlines() if line.startswith("[{") for row in json.loads(line)]
            if process.returncode and stderr.strip():
                words.append(stderr.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        words.append(f"no answer within {seconds:g} s")
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return told, words[0] if words else ""
