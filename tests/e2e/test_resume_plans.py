"""A run whose plan remembers prompts, killed and started again, ends in the same bits as one that was not.

Knapsack RL asks by the ledger: with one that began anew it would ask for other numbers of siblings, which the recorded
rollouts do not have. The pool is restored in tests/trainer/test_plans.py, every other plan in tests/methods.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import record_rollouts
from owpo import newest_step, steps_of, without, write_config
from rank_pool import Ranks
from warm import WarmRun, train

from owpo_megatron.config import Config

pytestmark = pytest.mark.ranks
STEPS = 6


def test_a_killed_run_with_a_ledger_ends_in_the_same_bits(ranks: Ranks, small: dict[str, Any], tmp_path: Path) -> None:
    """Two epochs of 24 problems; killed after step 4, when prompts come for the second time; resumed from step 4."""
    wanted = small | {
        "algorithm": {"name": "knapsack_rl"},
        "data": small["data"] | {"limit": 24},
        "optimizer": small["optimizer"] | {"steps": STEPS},
        "reference": {},
    }
    record_rollouts(Config.build(wanted), tmp_path / "recorded", steps=STEPS)
    wanted["rollout"] = wanted["rollout"] | {"replay": str(tmp_path / "recorded")}
    runs = Path(wanted["runs_dir"])
    train(ranks, write_config(tmp_path / "straight.yaml", wanted, {"name": "plan_straight"}))
    file = write_config(tmp_path / "killed.yaml", wanted, {"name": "plan_killed"})
    first = WarmRun(ranks, file, "checkpoint.every=2")
    first.wait_until(lambda: newest_step(runs / "plan_killed") >= 4, "step 4")
    first.kill()
    last = WarmRun(ranks, file)
    assert "resumed at step" in last.done()
    assert steps_of(runs / "plan_killed") == steps_of(runs / "plan_straight")
    ours, theirs = (ended(runs / name) for name in ("plan_killed", "plan_straight"))
    assert ours == theirs and len(ours["rollouts"]["ledger"]) == 24
    for weights in sorted((runs / "plan_straight" / "hf").glob("*.safetensors")):
        assert (runs / "plan_killed" / "hf" / weights.name).read_bytes() == weights.read_bytes()


def ended(run_dir: Path) -> dict[str, Any]:
    """Part of the last checkpoint that the trainer writes, without the copy of the metrics line."""
    return without(
        json.loads((run_dir / "checkpoints" / f"step_{STEPS:06d}" / "trainer.json").read_text()), "line", "run"
    )
