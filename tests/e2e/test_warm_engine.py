"""`owpo serve -c FILE --warm` with a real SGLang: runs of the file find it in turn, and it outlives them."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from owpo import Owpo, steps_of, values, write_config
from rank_pool import Ranks
from warm import train

pytestmark = [pytest.mark.server, pytest.mark.ranks, pytest.mark.extra]

RUNS = {
    "first": [],
    "second": [],
    "disk": ["sync.transport=disk"],
    "delta": ["sync.transport=disk", "sync.delta=true"],
    "distributed": ["sync.transport=distributed"],
}


def test_runs_find_the_warm_engine(small: dict[str, Any], ranks: Ranks, tmp_path: Path) -> None:
    """All runs draw the same responses, however their weights came: nothing of an earlier one's stays."""
    runs, short = tmp_path / "runs", {"optimizer": small["optimizer"] | {"steps": 2}}
    file = write_config(tmp_path / "run.yaml", small, short, {"runs_dir": str(runs)})
    served = Owpo(tmp_path, "serve", "-c", str(file), "--warm", "--log", str(tmp_path / "engine.log"))
    try:
        served.wait_until(lambda: "warm at http" in served.stdout, "a warm engine", timeout=240)
        for name, fields in RUNS.items():
            assert "using the warm engine at http" in train(ranks, file, f"name={name}", *fields)
        losses = {name: values(steps_of(runs / name), "loss") for name in RUNS}
        assert len(losses["first"]) == 2 and all(one == losses["first"] for one in losses.values()), losses
        again = Owpo(tmp_path, "serve", "-c", str(file), "--warm")
        assert again.process.wait(60) == 2 and "keeps an engine for this configuration already" in again.stderr
    finally:
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(30) == 0
    assert not list((runs / ".engines").glob("*/engine_0.json"))
