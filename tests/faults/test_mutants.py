"""The fault suite finds what is removed: each deliberately broken build of mutants.yaml comes out as broken.

A build is a copy of the sources with one text replaced; the suite of that copy injects the kind that is named. That the
suite accepts the build as it is is shown by test_fault_suite.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from owpo import ROOT
from registry import kinds

HERE = Path(__file__).parent
MUTANTS: list[dict[str, str]] = yaml.safe_load((HERE / "mutants.yaml").read_text())


def build(mutant: dict[str, str], out: Path) -> Path:
    """A copy of what the suite needs, with the text replaced."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("owpo_megatron", "tests/faults", "tests/data/golden", "examples/quickstart"):
        shutil.copytree(ROOT / name, out / name, ignore=ignored)
    (out / "tests" / "verifiers").mkdir()
    for file in [*(ROOT / "tests").glob("*.py"), ROOT / "tests" / "verifiers" / "hostile_rules.py"]:
        shutil.copy(file, out / file.relative_to(ROOT))
    (out / ".venv-engine").symlink_to(ROOT / ".venv-engine")
    file = out / mutant["file"]
    file.write_text(file.read_text().replace(mutant["text"], mutant["replacement"]))
    return out


def suite(tree: Path, limit: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(tree), "OWPO_FAULTS_LIMIT": limit}
    command = [sys.executable, str(tree / "tests" / "faults" / "suite.py"), *arguments]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one["name"])
def test_the_text_is_there_once(mutant: dict[str, str]) -> None:
    assert (ROOT / mutant["file"]).read_text().count(mutant["text"]) == 1
    assert mutant["kind"] in {kind.name for kind in kinds()}


def test_there_are_twenty() -> None:
    assert len(MUTANTS) >= 20 and len({one["name"] for one in MUTANTS}) == len(MUTANTS)


@pytest.mark.process
@pytest.mark.matrix
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one["name"])
def test_a_broken_build_is_caught(mutant: dict[str, Any], tmp_path: Path) -> None:
    """The effect counts, not a machine so busy that a run seems to hang: only a check of hangs comes out as one."""
    hangs = mutant.get("outcome") == "hang"
    tree, results = build(mutant, tmp_path / "tree"), tmp_path / "results.json"
    chosen = ("--kind", mutant["kind"], "--by", mutant.get("by", "ranks"), "--seed", str(mutant.get("seed", 1)))
    done = suite(tree, "60" if hangs else "900", *chosen, "--results", str(results))
    assert done.returncode == 1 and results.is_file(), done.stdout + done.stderr
    (result,) = json.loads(results.read_text())
    assert (result["outcome"] == "hang") == hangs and "the suite itself failed" not in result["told"], done.stdout
