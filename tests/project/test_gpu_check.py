"""tools/gpu_check.sh as it runs on the first machine with a GPU, rehearsed on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ["machine", "kernels", "head", "fp8", "ipc", "step", "bench", "swap"]


@pytest.mark.triton
def test_rehearsal(tmp_path: Path) -> None:
    """Every stage passes but the one that needs CUDA, which names its reason; rows are JSON with their bounds.

    Interpreters find what the machine has, and the wheels that the page lists (bare/sitecustomize.py).
    """
    path = os.pathsep.join(map(str, (ROOT / "tests" / "project" / "bare", ROOT / ".venv" / "triton")))
    env = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": path, "WHEELS": "none"}
    command = [ROOT / "tools" / "gpu_check.sh", "--rehearse", tmp_path]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1200)
    logs = "\n".join(file.read_text()[-1500:] for file in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + logs
    results = {line.split()[0]: line.split(" s  ")[1] for line in (tmp_path / "stages.log").read_text().splitlines()}
    assert list(results) == STAGES
    assert results.pop("ipc") == "not run: a CPU has no CUDA handles"
    assert set(results.values()) == {"passed"}
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert all(row["passed"] for row in rows)
    assert {row["stage"] for row in rows} == set(STAGES) - {"ipc"}
    summary = (tmp_path / "summary.md").read_text()
    assert "| step | update | yes | reference offloaded" in summary
    assert "| step | owpo train on recorded responses, 3 steps | yes |" in summary


@pytest.mark.process
def test_a_stage_without_its_parts_is_not_run(tmp_path: Path) -> None:
    command = [sys.executable, "-S", ROOT / "tools" / "gpu_stages.py", "swap", "--rows", tmp_path / "rows.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode != 0 and not (tmp_path / "rows.jsonl").exists()
