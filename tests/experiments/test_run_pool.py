"""Failing workers of the pool; the runs themselves are tested in tests/e2e."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from owpo_megatron.config import Config
from owpo_megatron.experiments import pool
from owpo_megatron.experiments.spec import RunSpec

pytestmark = pytest.mark.process

# In place of the worker's module: answers by the run's seed, and writes a summary when it is done.
WORKER = """
import json, sys
from pathlib import Path
for line in sys.stdin:
    config = json.loads(line)
    if config["seed"] == 13:
        sys.exit(1)
    if config["seed"] == 7:
        print(json.dumps({"ok": False, "reason": "model.path = x: no such folder", "mistake": True}), flush=True)
        continue
    folder = Path(config["runs_dir"]) / config["name"]
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    print(json.dumps({"ok": True}), flush=True)
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "worker.py").write_text(WORKER)
    monkeypatch.setattr(pool, "WORKER", [sys.executable, str(tmp_path / "fake" / "worker.py")])
    return tmp_path / "lab" / "runs"


def spec(seed: int, tmp_path: Path, reference: RunSpec | None = None) -> RunSpec:
    raw = {"seed": seed, "model": {"path": str(tmp_path)}, "data": {"source": "task:cipher"}}
    return RunSpec(f"run-s{seed}", Config.build(raw), reference)


def test_a_failed_run_takes_along_what_needs_it_and_nothing_else(root: Path, tmp_path: Path) -> None:
    bad = spec(7, tmp_path)
    told: list[tuple[str, str]] = []
    runs = [spec(1, tmp_path, reference=bad), spec(2, tmp_path, reference=spec(3, tmp_path)), spec(4, tmp_path)]
    failures = pool.run_all(runs, root, 2, lambda what, one: told.append((what, one.label)))
    assert {failure.spec.label: failure.mistake for failure in failures} == {"run-s7": True, "run-s1": False}
    assert {label for what, label in told if what == "done"} == {"run-s2", "run-s3", "run-s4"}
    order = [label for what, label in told if what == "started"]
    assert order.index("run-s3") < order.index("run-s2")

    told.clear()
    pool.run_all(runs[1:], root, 2, lambda what, one: told.append((what, one.label)))
    assert {what for what, _ in told} == {"cached"}


def test_every_run_is_accounted_for_when_the_workers_die(root: Path, tmp_path: Path) -> None:
    failures = pool.run_all([spec(13, tmp_path), spec(1, tmp_path), spec(2, tmp_path)], root, 1)
    assert sorted(failure.spec.label for failure in failures) == ["run-s1", "run-s13", "run-s2"]
