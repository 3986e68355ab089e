"""Submit a job to Slurm: configurations and script into the run folder, then sbatch."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from owpo_megatron.launch.checks import require_command
from owpo_megatron.launch.job import Job
from owpo_megatron.launch.render import render_sbatch
from owpo_megatron.launch.slurm import cluster
from owpo_megatron.launch.slurm.record import Submission, refuse_if_busy, remember
from owpo_megatron.run.layout import RunFolder


def submit_job(job: Job) -> Submission:
    """Write what the job needs and queue it.

    Raises:
        UserError: no sbatch here, the run has a job already, or sbatch refused.
    """
    require_command("sbatch")
    refuse_if_busy(job.config.run_dir)
    script = write_files(job, "job.sbatch", render_sbatch(job))
    jobs: list[int] = []
    for _ in range(job.links):
        jobs.append(cluster.submit(script, job.workdir, after=jobs[-1] if jobs else None))
    submission = Submission(jobs, "slurm", datetime.now().isoformat(timespec="seconds"), _outputs(job, jobs))
    remember(job.config.run_dir, submission)
    return submission


def write_files(job: Job, name: str, script: str) -> Path:
    """config.yaml of every run and the script; returns the script's path."""
    for config in job.run_configs():
        folder = RunFolder.of(config)
        folder.logs.mkdir(parents=True, exist_ok=True)
        (folder.launch / "done").unlink(missing_ok=True)
        config.save(folder.config)
    RunFolder.of(job.config).logs.mkdir(parents=True, exist_ok=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    file = job.folder / name
    file.write_text(script)
    file.chmod(0o755)
    return file.absolute()


def _outputs(job: Job, jobs: list[int]) -> list[str]:
    logs = RunFolder.of(job.config).logs
    if job.seeds:
        return [str(logs / f"job-{number}_{seed}.out") for number in jobs for seed in job.seeds]
    return [str(logs / f"job-{number}.out") for number in jobs]
