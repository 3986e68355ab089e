"""The training head at the recipes' shapes on a GPU that is not there: host syncs, memory, kernels (tools/dry_gpu.py).

Not covered: the layers, time, and what a real kernel would refuse.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TRITON = ROOT / ".venv" / "triton"
GIB = 2**30


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    file = tmp_path_factory.mktemp("dry") / "rows.json"
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{TRITON}"}
    command = [sys.executable, str(ROOT / "tools" / "dry_table.py"), "--json", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(file.read_text())
    return found


pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not TRITON.exists(), reason=f"no {TRITON}; `make test-extra` installs Triton there"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="a dry run needs a CPU build of torch"),
]


def test_the_host_waits_once_for_a_microbatch(rows: list[dict[str, Any]]) -> None:
    """Two models, three sizes of the tensor-parallel group, two heads; once for which rows take part."""
    assert len(rows) == 2 * 3 * 2 * 2
    for row in rows:
        (place,) = row["syncs"]
        assert row["syncs"][place] == 1 and "head/rows.py" in place, row


def test_memory_is_that_of_the_plan(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["extra"] < 4 * GIB, row
        assert row["extra"] <= 1.05 * row["planned"], row
        if row["what"] == "loss":
            assert row["extra"] > 0.9 * row["planned"], row


def test_kernels_of_a_microbatch(rows: list[dict[str, Any]]) -> None:
    """A chunk has about 140 small ones and three products, a log-prob pass a handful."""
    for row in rows:
        if row["mode"] == "exact":
            assert row["kernels"] < (800 if row["what"] == "loss" else 60), row
