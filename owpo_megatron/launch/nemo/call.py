"""`owpo launch --with nemo-run`, in the trainer's environment: asks NeMo-Run's environment to submit."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from datetime import datetime
from pathlib import Path

import owpo_megatron
from owpo_megatron.errors import UserError
from owpo_megatron.launch.checks import require_command
from owpo_megatron.launch.job import Job
from owpo_megatron.launch.nemo.request import Request
from owpo_megatron.launch.slurm.record import Submission, refuse_if_busy, remember
from owpo_megatron.launch.slurm.submit import write_files
from owpo_megatron.run.layout import RunFolder


def nemo_python(job: Job) -> Path:
    """The interpreter that has NeMo-Run. Raises UserError where there is none."""
    beside = Path(owpo_megatron.__file__).resolve().parents[1] / ".venv-nemo" / "bin" / "python"
    python = job.launch.nemo_python or beside
    if not os.access(python, os.X_OK):
        raise UserError("launch.nemo_python", python, "no such interpreter; run `make nemo`")
    return python


def render_nemo(job: Job) -> str:
    """The batch script that NeMo-Run would submit, and the script that every node executes."""
    with tempfile.TemporaryDirectory(prefix="owpo-nemo-") as folder:
        request = Request.of(job)
        batch = _ask(job, request, Path(folder), "--dry-run")["script"]
    return f"{batch}\n# ---- every node executes:\n{request.script}"


def submit_nemo(job: Job) -> Submission:
    """Write what the job needs and let NeMo-Run queue it.

    Raises:
        UserError: no sbatch or no NeMo-Run here, the run has a job already, or it was refused.
    """
    require_command("sbatch")
    refuse_if_busy(job.config.run_dir)
    request = Request.of(job)
    write_files(job, "node.sh", request.script)
    number = _ask(job, request, job.folder.absolute())["job"]
    at = datetime.now().isoformat(timespec="seconds")
    submission = Submission([number], "nemo-run", at, [str(RunFolder.of(job.config).logs / f"job-{number}.out")])
    remember(job.config.run_dir, submission)
    return submission


def _ask(job: Job, request: Request, folder: Path, *options: str) -> dict:
    request.save(folder / "request.json")
    result = folder / "result.json"
    command = [nemo_python(job), "-m", "owpo_megatron.launch.nemo.runner"]
    command += [folder / "request.json", folder / "nemo", result, *options]
    log = folder / "nemo-run.log"
    with log.open("w") as words:  # its output is long
        done = subprocess.run([str(part) for part in command], stdout=words, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        raise UserError("nemo-run", log, f"refused: {' '.join(last).removeprefix('error: ')}")
    return json.loads(result.read_text())
