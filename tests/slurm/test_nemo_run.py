"""NeMo-Run on the same Slurm, without accounting: its own status would know nothing there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from launched import Launched, processes
from owpo import ROOT, Owpo, newest_step, steps_of

PYTHON = ROOT / ".venv-nemo" / "bin" / "python"
pytestmark = [
    *(pytest.mark.ranks, pytest.mark.slurm, pytest.mark.nemo),
    pytest.mark.skipif(not os.access(PYTHON, os.X_OK), reason=f"no {PYTHON}; run `make nemo`"),
]

TWO_TASKS = """
import sys
from pathlib import Path
from owpo_megatron.config import Config
from owpo_megatron.launch.job import Job
from owpo_megatron.launch.nemo.pipeline import Pipeline
from owpo_megatron.launch.nemo.request import Request

here, config, first = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
job = Job(Config.load(config, ["launch.env={WORDS: \\"it's $HOME\\"}"]), here)
pipeline = Pipeline("two", here / "home", sys.argv[4])
one = pipeline.add(Request.command("one", first, job))
pipeline.add(Request.command("two", 'echo "$WORDS" > two.txt', job), after=[one])
sys.exit(pipeline.run())
"""


def pipeline(here: Path, config: Path, first: str, where: str = "slurm") -> subprocess.CompletedProcess[str]:
    (here / "pipeline.py").write_text(TWO_TASKS)
    command = [str(PYTHON), str(here / "pipeline.py"), str(here), str(config), first, where]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=here)


def test_a_run_is_submitted_requeued_and_resumed(lab: Any, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """Slurm's warning reaches every process of the step, torchrun too: the run saves all the same, and goes on."""
    run = Launched(tmp_path, "nemo", tiny_run)
    job = run.submit("--with", "nemo-run")
    run.wait_until(lambda: newest_step(run.run_dir) >= 3, "step 3")
    subprocess.run(["scancel", "--signal=USR1", str(job)], check=True)
    run.wait_until(lambda: "stopped and saved" in run.words(), "saving")
    assert newest_step(run.run_dir) < 10, "the run was over before its time was"
    assert run.wait_for_end() == ["COMPLETED"], run.told()
    assert run.states()[0].attempt == 1 and "resumed at step" in run.words()
    assert [line["step"] for line in steps_of(run.run_dir)] == list(range(1, 11))
    assert processes(job) == []


def test_tasks_depend_on_each_other(lab: Any, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """A variable with a quote, a blank and a dollar arrives as it is."""
    config = Launched(tmp_path, "tasks", tiny_run).config
    done = pipeline(tmp_path, config, "sleep 1; touch one.txt")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "two.txt").read_text() == "it's $HOME\n"
    assert (tmp_path / "two.txt").stat().st_mtime >= (tmp_path / "one.txt").stat().st_mtime


def test_a_failed_task_is_not_a_success(lab: Any, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """Exit code 1, and what depended on it never ran."""
    config = Launched(tmp_path, "tasks", tiny_run).config
    done = pipeline(tmp_path, config, "exit 3")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed" in done.stdout and "two: " in done.stdout
    assert not (tmp_path / "two.txt").exists()


@pytest.mark.parametrize(("first", "code"), [("true", 0), ("exit 3", 1)])
def test_on_this_machine(tiny_run: dict[str, Any], tmp_path: Path, first: str, code: int) -> None:
    config = Launched(tmp_path, "tasks", tiny_run).config
    done = pipeline(tmp_path, config, first, "local")
    assert done.returncode == code, done.stdout + done.stderr
    assert (tmp_path / "two.txt").exists() == (code == 0)


def test_a_dry_run_shows_both_scripts(tiny_run: dict[str, Any], tmp_path: Path) -> None:
    run = Launched(tmp_path, "dry", tiny_run)
    shown = Owpo(tmp_path, "launch", "-c", str(run.config), "--with", "nemo-run", "--dry-run").done()
    assert "#SBATCH --signal=USR1@300" in shown and "# ---- every node executes:" in shown
    assert not run.run_dir.exists()
