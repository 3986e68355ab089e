"""The plugin that keeps the tiers apart (tests/tiers.py), on small suites of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process
TESTS = Path(__file__).parents[1]
INI = """[pytest]
markers =
    process
    ranks
    server
    slow
    matrix
"""
SUITE = """
import subprocess, sys, pytest

@pytest.fixture
def ranks():
    return 2

def test_with_ranks(ranks): pass
def test_plain(): pass
def test_starts_a_process(): subprocess.run([sys.executable, "-c", ""])
@pytest.mark.process
def test_may_start_a_process(): subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
@pytest.mark.parametrize("case", range(3))
@pytest.mark.matrix
def test_exhaustive(case): assert case != 1
def test_busy(): sum(range(20_000_000))
"""


def run(folder: Path, *options: str) -> dict[str, str]:
    """{test: outcome} of the suite with these options of pytest."""
    (folder / "pytest.ini").write_text(INI)
    (folder / "test_suite.py").write_text(SUITE)
    env = os.environ | {"PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "pytest", "-p", "tiers", "-p", "no:cacheprovider", "-rA", *options]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    (folder / "said").write_text(done.stdout + done.stderr)
    lines = [line.split() for line in done.stdout.splitlines() if "test_suite.py::" in line]
    return {line[1].partition("::")[2]: line[0] for line in lines if line[0] in ("PASSED", "FAILED")}


def test_only_a_marked_test_starts_processes(tmp_path: Path) -> None:
    outcomes = run(tmp_path, "-k", "process")
    assert outcomes == {"test_starts_a_process": "FAILED", "test_may_start_a_process": "PASSED"}
    assert "mark it `process`" in (tmp_path / "said").read_text()


def test_fixtures_bring_marks_and_the_matrix_waits_to_be_asked(tmp_path: Path) -> None:
    assert run(tmp_path, "-m", "ranks") == {"test_with_ranks": "PASSED"}
    assert run(tmp_path, "-m", "not ranks", "-k", "plain or exhaustive") == {"test_plain": "PASSED"}


@pytest.mark.slow
def test_cpu_seconds_are_counted_children_included_and_limited(tmp_path: Path) -> None:
    file = tmp_path / "cpu.json"
    outcomes = run(tmp_path, "-k", "plain or busy or may_start", "--cpu-limit=0.05", f"--cpu-json={file}")
    assert outcomes == {"test_plain": "PASSED", "test_busy": "FAILED", "test_may_start_a_process": "FAILED"}
    seconds = {name.partition("::")[2]: phases["call"] for name, phases in json.loads(file.read_text()).items()}
    assert seconds["test_plain"] < 0.05 < min(seconds["test_busy"], seconds["test_may_start_a_process"])
    assert "above the limit of 0.05; mark it `slow`" in (tmp_path / "said").read_text()


def test_the_matrix_writes_what_it_found(tmp_path: Path) -> None:
    outcomes = run(tmp_path, "-m", "matrix", "--matrix-result=matrix.md")
    assert sorted(outcomes.values()) == ["FAILED", "PASSED", "PASSED"]
    text = (tmp_path / "matrix.md").read_text()
    assert "| `test_suite.py::test_exhaustive` | 2 | 1 | 0 |" in text
    assert "- commit: " in text and "- wall time: " in text and "- date: 20" in text
