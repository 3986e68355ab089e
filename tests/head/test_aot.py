"""Kernels of the head compiled ahead of time for GPUs that are not here, with the Triton of the GPU image.

Not covered: speed, races, and what the driver does with the result.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRITON = ROOT / ".venv" / "triton"


def pin(file: str) -> str:
    found = re.search(r"^triton==(\S+)", (ROOT / "requirements" / file).read_text(), re.MULTILINE)
    assert found
    return found[1]


def test_the_tests_use_the_triton_of_the_image() -> None:
    assert pin("triton-test.txt") == pin("trainer-gpu.txt") == pin("engine-gpu.txt")


@pytest.mark.triton
@pytest.mark.skipif(not TRITON.exists(), reason=f"no {TRITON}; `make test-extra` installs Triton there")
def test_no_kernel_spills_and_every_load_is_wide(tmp_path: Path) -> None:
    """Targets are Ampere, Hopper and Blackwell; the vocabulary is no multiple of anything."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{TRITON}", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "tools" / "compile_kernels.py"), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["triton"] == pin("triton-test.txt")
    assert len(found["rows"]) == 12 * 3
    for row in found["rows"]:
        assert row["spilled_bytes"] == 0 and row["wide_loads"] and row["registers"] <= 128, row
