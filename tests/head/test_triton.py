"""Runs triton_cases.py in a process of its own: interpreting is a switch of the whole process, and Triton (1 GB) is
installed where nothing else finds it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TRITON = ROOT / ".venv" / "triton"


def run_cases(*options: str, **env: str) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), env.pop("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *options]
    done = subprocess.run(
        [*command, str(Path(__file__).with_name("triton_cases.py"))],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path} | env, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1], done.stdout[-2000:]


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled on CUDA instead")
@pytest.mark.skipif(not TRITON.exists(), reason=f"no {TRITON}; `make test-extra` installs Triton there")
def test_interpreted() -> None:
    """Logic and masking of every kernel, and the head made of them. Not covered: what triton_cases.py names."""
    run_cases(TRITON_INTERPRET="1", PYTHONPATH=str(TRITON))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_compiled() -> None:
    """The same cases, compiled, on the GPU."""
    run_cases()
