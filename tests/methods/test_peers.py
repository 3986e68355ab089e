"""Methods against the functions of verl and TRL, value by value: losses, gradients of every token, advantages, masks.

They have an environment of their own, `make peers`. Not covered: ms-swift's `real`, which is no function of its own
(autograd in test_coupled_objectives.py), and what only authors' code has (hand-worked numbers there).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
pytestmark = [
    *(pytest.mark.extra, pytest.mark.process),
    pytest.mark.skipif(not os.access(PYTHON, os.X_OK), reason=f"no {PYTHON}; run `make peers`"),
]
CASES = (
    *("dual_clip, verl vanilla", "gspo, verl gspo", "cispo, verl cispo", "sapo, verl sapo", "gmpo, verl geo_mean"),
    *("dro, verl dro", "dppo_tv, verl dppo_tv", "dppo_kl, verl dppo_kl", "clip_cov, verl clip_cov"),
    *("kl_cov, verl kl_cov", "gpg, verl gpg", "rloo, verl advantage", "loop, verl advantage", "opo, verl advantage"),
    *("reinforce_pp, verl advantage", "reinforce_pp_baseline, verl advantage", "grpo_passk, verl advantage"),
    *("gpg, verl advantage", "gdpo, verl advantage", "dr_grpo, verl advantage", "vespo, TRL weights"),
    *("off_policy_mask, TRL mask", "entropy_mask, TRL mask"),
)


@pytest.fixture(scope="module")
def compared() -> dict[str, list[list[float]]]:
    """{case: [ours, theirs]}; one process for all of them."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [PYTHON, Path(__file__).with_name("peer_worker.py")], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout[done.stdout.index("{") :])


def test_every_comparison_is_listed(compared: dict[str, list[list[float]]]) -> None:
    assert set(compared) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_equal(compared: dict[str, list[list[float]]], case: str) -> None:
    ours, theirs = compared[case]
    assert len(ours) == len(theirs) and len(set(theirs)) > 1, "several different numbers"
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-7)
