"""Slurm's commands as functions: sbatch, scontrol, sacct, scancel."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from owpo_megatron.errors import UserError

_OF_THE_CLUSTER = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"})  # not of a job
ENDED_WELL = frozenset({"COMPLETED"})
ENDED_BADLY = frozenset(
    {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "PREEMPTED"}
)


@dataclass(frozen=True)
class JobState:
    """Slurm's state of a job, or of one task of an array.

    Example:
        JobState(id="4711", number=4711, state="RUNNING", attempt=1, nodes="n[0-2]", reason="", exit_code="0:0")
    """

    id: str  # of an array's task: JOB_TASK
    number: int  # SLURM_JOB_ID, which every task of an array has of its own
    state: str
    attempt: int  # how often it was requeued
    nodes: str
    reason: str
    exit_code: str

    @property
    def ended(self) -> bool:
        """False for REQUEUED and REQUEUE_HOLD, which Slurm queues again in a moment."""
        return self.state in ENDED_WELL | ENDED_BADLY

    @property
    def ended_well(self) -> bool:
        return self.state in ENDED_WELL


def submit(script: Path, workdir: Path, after: int | None = None) -> int:
    """Submit a script by sbatch; returns the job's number.

    Args:
        after: a job that must complete first.

    Raises:
        UserError: sbatch refused it; with its message.
    """
    wait = [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    done = run("sbatch", "--parsable", *wait, str(script), cwd=workdir, env=_outside_of_jobs())
    if done.returncode:
        raise UserError("sbatch", script, f"refused: {' '.join(done.stderr.split())}")
    return int(done.stdout.split(";")[0])


def states(job_id: int) -> list[JobState]:
    """A job's state, or those of an array's tasks; [] when neither scontrol nor sacct knows it (any more)."""
    asked = run("scontrol", "show", "job", str(job_id), "--oneliner")
    if asked.returncode == 0:
        return from_scontrol(asked.stdout)
    fields = "JobID,JobIDRaw,State,Restarts,NodeList,ExitCode"
    kept = run("sacct", "-j", str(job_id), "-X", "-n", "-P", "-o", fields)
    if kept.returncode:
        return []
    found = []
    for line in kept.stdout.splitlines():
        name, number, state, restarts, nodes, exit_code = line.split("|")
        found.append(JobState(name, int(number), state.split()[0], int(restarts or 0), nodes, "", exit_code))
    return found


def cancel(job_id: int) -> None:
    """Cancel a job at once. Raises UserError with scancel's message."""
    done = run("scancel", str(job_id))
    if done.returncode:
        raise UserError("job", job_id, f"not cancelled: {' '.join(done.stderr.split())}")


def _outside_of_jobs() -> dict[str, str]:
    """The environment without what a job around this shell has: `--export=NONE` lets SLURM_* through, and sizes of that
    job which the new one does not set again (SLURM_MEM_PER_CPU, SLURM_CPU_BIND, ...) would be options of its sruns."""
    inside = "SLURM_JOB_ID" in os.environ
    return {
        name: value
        for name, value in os.environ.items()
        if not (inside and name.startswith("SLURM_") and name not in _OF_THE_CLUSTER)
    }


def run(
    *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """One of Slurm's commands; one that is missing counts as failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]}: no such command")


def from_scontrol(text: str) -> list[JobState]:
    """Parse the output of `scontrol show job N --oneliner`."""
    return [_state(line) for line in text.splitlines() if line.startswith("JobId=")]


def _state(line: str) -> JobState:
    fields = dict(re.findall(r"(\w+)=(\S*)", line))
    name = fields["JobId"]
    if "ArrayTaskId" in fields:
        name = f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}"
    reason = fields.get("Reason", "")
    return JobState(
        name,
        int(fields["JobId"]),
        fields["JobState"],
        int(fields.get("Restarts", 0)),
        fields.get("NodeList", "").replace("(null)", ""),
        "" if reason == "None" else reason,
        fields.get("ExitCode", ""),
    )
