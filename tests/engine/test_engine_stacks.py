"""Stacks of an engine that is ended because the run hangs: a real SGLang server writes them into its log."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine import start_fleet


@pytest.mark.server
@pytest.mark.extra
def test_an_aborted_engine_leaves_its_stacks(engine_python: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = EngineConfig(python=engine_python, device="cpu")
    with start_fleet(config, tiny_model, "float32", {}, tmp_path) as fleet:
        fleet.abort()
        deadline = time.monotonic() + 60
        while "Fatal Python error: Aborted" not in (log := (tmp_path / "engine_0.log").read_text()):
            assert time.monotonic() < deadline, log[-2000:]
            time.sleep(0.1)
    assert "most recent call first" in log.partition("Fatal Python error: Aborted")[2]
