"""Transformer Engine's own layers beside the local ones, without a GPU (tools/dry_te.py): tensors, marks, weights.

Skipped where Transformer Engine cannot be imported, by the interpreter of OWPO_TE_PYTHON or this one. docs/container.md
states how to make an environment for it. Not covered: anything that computes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from family_cases import CASES
from tiny import make_hf_model

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("OWPO_TE_PYTHON", sys.executable)
EXPERTS = ["2,1", "2,2"]
LAYOUTS = {  # tensor- and expert-parallel sizes; elsewhere 1,1 and 2,1
    "gpt_oss": ["1,1", "2,2"],  # experts with biases, that megatron-core has whole
    **dict.fromkeys(
        ["qwen3_next", "qwen3_5_moe_text"], ["1,1", "1,2"]
    ),  # the tiny ones' linear attention has few heads
    "qwen3_5_text": ["1,1"],
    **dict.fromkeys(["qwen3_moe", "mixtral", "qwen2_moe", "glm4_moe", "deepseek_v3", "deepseek_v2"], EXPERTS),
}
SHAPES: dict[str, dict[str, Any]] = {family: {} for family in ("qwen2", "qwen3", "llama", "mistral", "qwen3_moe")}
SHAPES |= {family: shapes[0] for family, shapes in CASES.items()}


def run(*given: str | Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([PYTHON, *map(str, given)], env=env, capture_output=True, text=True, timeout=800)


@pytest.fixture(scope="module", autouse=True)
def engine() -> None:
    asked = run("-c", "import transformer_engine.pytorch")
    if asked.returncode:
        reason = (asked.stderr.strip() or "?").rpartition("\n")[2]
        pytest.skip(f"{PYTHON}: {reason}; OWPO_TE_PYTHON names an interpreter with Transformer Engine")


@pytest.mark.process
@pytest.mark.extra
@pytest.mark.parametrize("family", sorted(SHAPES))
def test_they_hold_what_the_local_layers_hold(family: str, tmp_path: Path) -> None:
    model, rows = make_hf_model(tmp_path / family, family, **SHAPES[family]), tmp_path / "rows.json"
    layouts = LAYOUTS.get(family, ["1,1", "2,1"])
    done = run(ROOT / "tools" / "dry_te.py", model, "--json", rows, "--layout", *layouts)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    weights, *found = json.loads(rows.read_text())
    assert weights["lost"] == {"hf": [], "saved": []}
    assert [f"{row['tp']},{row['ep']}" for row in found] == layouts
    for row in found:
        assert any(part.startswith("TE") for part in row["engine"]["parts"])
        assert not any(part.startswith("TE") for part in row["local"]["parts"])
        assert family != "gpt_oss" or _without_sinks(row)
        assert row["engine"]["tensors"] == row["local"]["tensors"]


def _without_sinks(row: dict[str, Any]) -> bool:
    """Drop gpt-oss's sinks, which Transformer Engine has in float32 whatever the model's dtype; whether that is all."""
    same = True
    for name in [one for one in row["engine"]["tensors"] if "softmax_offset" in one]:
        engine, local = (row[kind]["tensors"].pop(name) for kind in ("engine", "local"))
        same &= engine.pop("dtype") == "torch.float32" and local.pop("dtype") == "torch.bfloat16" and engine == local
    return same
