"""Jobs of a run: RUN/launch/jobs.jsonl, a line per submission."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from owpo_megatron.errors import UserError
from owpo_megatron.launch.slurm import cluster
from owpo_megatron.run.layout import RunFolder


@dataclass(frozen=True)
class Submission:
    """One `owpo launch`: a job, an array, or a chain of jobs.

    Example:
        Submission(jobs=[4711], by="slurm", at="2026-11-21T10:02:11", outputs=["runs/my-run/logs/job-4711.out"])
    """

    jobs: list[int]
    by: str  # slurm or nemo-run
    at: str
    outputs: list[str]  # output files of the jobs, one per job or task

    def states(self) -> list[cluster.JobState]:
        return [state for job in self.jobs for state in cluster.states(job)]

    def active(self) -> list[cluster.JobState]:
        """Jobs that run, or wait in the queue."""
        return [state for state in self.states() if not state.ended]


def file_of(run_dir: Path) -> Path:
    return RunFolder(run_dir).launch / "jobs.jsonl"


def remember(run_dir: Path, submission: Submission) -> None:
    """Add a line."""
    file = file_of(run_dir)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        opened.write(json.dumps(asdict(submission)) + "\n")


def submissions(run_dir: Path) -> list[Submission]:
    """Oldest first; [] where nothing was ever launched."""
    file = file_of(run_dir)
    if not file.is_file():
        return []
    return [Submission(**json.loads(line)) for line in file.read_text().splitlines()]


def latest(run_dir: Path) -> Submission:
    """The newest submission. Raises UserError where there is none."""
    found = submissions(run_dir)
    if not found:
        raise UserError("run folder", run_dir, "nothing was launched from here; give a folder that `owpo launch` made")
    return found[-1]


def refuse_if_busy(run_dir: Path) -> None:
    """Raises UserError while a job of this run is in the queue or runs: two would write into one folder."""
    for submission in submissions(run_dir):
        for state in submission.active():
            raise UserError(
                "run folder", run_dir,
                f"job {state.id} is {state.state.lower()}: wait for it, `owpo launch cancel {run_dir}`, or give "
                "this run another name=...",
            )  # fmt: skip
