"""Runs that draw steps ahead of their updates (`rollout.max_staleness`): on recorded rollouts, and with a real engine
that gets weights while it generates.

Not covered: how well such a run learns against one that takes turns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from owpo import lines_of, steps_of, values, without, write_config
from rank_pool import Ranks
from warm import train, train_all

from owpo_megatron.engine import load_rollouts, rollouts_path

CORRECTED = {"algorithm": {"tis_cap": 2.0}}


@pytest.mark.ranks
def test_on_recorded_rollouts_a_run_ahead_has_the_bits_of_one_that_takes_turns(
    ranks: Ranks, recorded: dict[str, Any], tmp_path: Path
) -> None:
    """Swap the reference after steps 2 and 4. The recorded rollouts are all of version 0, hence the large bound."""
    files = []
    for bound in (0, 5):
        layers = (recorded, CORRECTED, {"name": f"bound_{bound}", "rollout": {"max_staleness": bound}})
        sizes = {"optimizer": {"steps": 5}, "reference": {"every": 2}, "checkpoint": {"export_hf": False}}
        files.append(write_config(tmp_path / f"{bound}.yaml", *layers, sizes))
    train_all(ranks, files)
    turns, ahead = (lines_of(Path(recorded["runs_dir"]) / f"bound_{bound}") for bound in (0, 5))
    own = ("staleness", "generation_seconds", "seconds", "speed")
    assert [without(line, *own) for line in ahead] == [without(line, *own) for line in turns]
    assert [line["staleness"]["max"] for line in ahead] == [0, 1, 2, 3, 4]


@pytest.mark.server
@pytest.mark.ranks
def test_a_real_engine_generates_beside_training_and_after_a_resume(
    ranks: Ranks, small: dict[str, Any], server_url: str, tmp_path: Path
) -> None:
    steps, more = 4, 6
    sizes = {
        "rollout": {"prompts_per_step": 16, "group_size": 8, "max_staleness": 1},
        "optimizer": {"steps": steps, "tokens_per_microbatch": 1024},
        "checkpoint": {"export_hf": False},
    }
    layers = (small, CORRECTED, sizes, {"name": "ahead", "engine": {"urls": [server_url]}})
    config = write_config(tmp_path / "run.yaml", *layers)
    train(ranks, config)
    train(ranks, config, f"optimizer.steps={more}")
    run = Path(small["runs_dir"]) / "ahead"
    lines = steps_of(run)
    assert values(lines, "step") == list(range(1, more + 1))
    stale = [line["staleness"]["max"] for line in lines]
    assert stale[0] == stale[steps] == 0, "nothing was drawn ahead of the first step, nor of the first after the resume"
    assert set(stale) == {0, 1}
    assert all(0 < line["tis_mean"] < 2 for line in lines)
    for step in range(1, more + 1):
        for rollout in load_rollouts(rollouts_path(run / "rollouts", step)):
            assert sum(count for _, count in rollout.spans) == len(rollout.response_ids)
            assert {version for version, _ in rollout.spans} <= {step - 2, step - 1}


@pytest.mark.server
@pytest.mark.ranks
@pytest.mark.extra
@pytest.mark.parametrize("workers", [0, 1])
def test_a_real_engine_cuts_responses_and_goes_on_with_them(
    ranks: Ranks, small: dict[str, Any], server_url: str, tmp_path: Path, workers: int
) -> None:
    steps = 4
    sizes = {
        "rollout": {"prompts_per_step": 8, "group_size": 8, "max_staleness": 2, "surplus": 0.5, "workers": workers},
        "optimizer": {"steps": steps, "tokens_per_microbatch": 1024},
        "checkpoint": {"export_hf": False},
    }
    few = {"urls": [server_url], "concurrency": 16}  # the last groups wait for their turn while the first are complete
    layers = (small, CORRECTED, sizes, {"name": f"partial_{workers}", "engine": few})
    train(ranks, write_config(tmp_path / "run.yaml", *layers))
    run = Path(small["runs_dir"]) / f"partial_{workers}"
    lines = steps_of(run)
    assert values(lines, "step") == list(range(1, steps + 1))
    assert sum(line["partial"]["cut"] for line in lines) > 0 and lines[-1]["partial"]["groups"] == 0
    assert all(0 <= line["partial"]["continued"] < 1 and line["staleness"]["max"] <= 2 for line in lines)
    for step in range(1, steps + 1):
        for rollout in load_rollouts(rollouts_path(run / "rollouts", step)):
            assert rollout.finish_reason != "abort"
            assert sum(count for _, count in rollout.spans) == len(rollout.response_ids) == len(rollout.behaviour_logp)
            assert {version for version, _ in rollout.spans} <= {step - 3, step - 2, step - 1}
