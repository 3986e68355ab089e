"""The layers on a GPU that is not there, forward and backward (tools/dry_layers.py): host syncs, memory, kernels.

Not covered: Transformer Engine's own layers, the head (test_dry_gpu.py), time, and what a real kernel would refuse.
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

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(torch.version.cuda is not None, reason="a dry run needs a CPU build of torch"),
]


def rows(tmp_path: Path, *given: str) -> list[dict[str, Any]]:
    file = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "tools" / "dry_layers.py"), "--json", str(file), *given]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(file.read_text())
    return found


def check(row: dict[str, Any]) -> None:
    waits = {phase: sum(places.values()) for phase, places in row["syncs"].items()}
    if row["ep"] == 1:
        assert not any(waits.values()), row
    else:  # sizes of the exchange; without the fused permutation also two counts of chosen tokens
        each = row["layers"] * (1 if row["fused"] else 3)
        assert waits == {"log-probs": each, "forward": each, "backward": 0}, row
    assert row["kept"] <= row["peak"]


@pytest.mark.extra
def test_a_dense_model_never_waits_in_its_layers(tmp_path: Path) -> None:
    """Qwen3-8B at tp 8, 64 ranks; the fused kernels save launches and memory."""
    plain, fused = rows(tmp_path, "--model", "qwen3-8b-base", "--tp", "8")
    for row in (plain, fused):
        check(row)
    assert all(fused["kernels"][phase] < plain["kernels"][phase] for phase in plain["kernels"])
    assert fused["kept"] < plain["kept"]


@pytest.mark.matrix
@pytest.mark.timeout(3600)
def test_every_model_and_layout(tmp_path: Path) -> None:
    found = rows(tmp_path)
    assert len(found) == 2 * (2 + 3 + 2 + 2)
    for row in found:
        check(row)
