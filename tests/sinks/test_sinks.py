"""Metrics in TensorBoard's event files, read back; and that a tracker can neither slow a run down nor end it.

Weights & Biases, MLflow and trackio are in test_trackers.py: their packages have an environment of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.sinks import GuardedSink, check_installed, guarded, make_sinks
from owpo_megatron.sinks.names import scalars

LINE: dict[str, Any] = {
    "step": 3, "loss": 0.5, "n_active": 4, "delta_hist": [1, 2], "seconds": {"rollout": 1.5, "total": 2.0},
    "verifier": {"ok": 7}, "note": "text", "done": True, "bad": float("nan"),
}  # fmt: skip


def config(tmp_path: Path, **sinks: Any) -> Config:
    raw = {"name": "a", "runs_dir": str(tmp_path), "model": {"path": "m"}, "data": {"source": "task:cipher"}}
    return Config.build(raw | {"sinks": sinks})


def test_tensorboards_files_hold_every_number(tmp_path: Path) -> None:
    """Read by TensorBoard's own reader: names, steps, values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    (sink,) = make_sinks(config(tmp_path, to=["tensorboard"]), said.append)
    sink.step(LINE)
    sink.evaluation(3, {"pass@1": 0.25, "problems": 40})
    sink.step(LINE | {"step": 4, "loss": 0.25})
    sink.close()
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard"))
    events.Reload()
    found = {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found["train/loss"] == [(3, 0.5), (4, 0.25)]
    assert found["train/seconds/total"] == [(3, 2.0), (4, 2.0)]
    assert found["eval/pass_at_1"] == [(3, 0.25)] and found["train/verifier/ok"] == [(3, 7.0), (4, 7.0)]
    assert not said and "train/note" not in found and "train/step" not in found


def test_lines_become_numbers() -> None:
    assert scalars({name: LINE[name] for name in LINE if name != "step"}) == {
        "loss": 0.5, "n_active": 4.0, "seconds/rollout": 1.5, "seconds/total": 2.0, "verifier/ok": 7.0,
    }  # fmt: skip


class Breaks:
    """A tracker that fails at its second call."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.steps:
            raise ConnectionError("the server\nis gone")
        self.steps.append(step)

    def close(self) -> None:
        raise AssertionError("nothing more is asked of it")


def test_a_failing_tracker_is_reported_once_and_left_alone() -> None:
    tracker, said = Breaks(), list[str]()
    sink = GuardedSink("mine", lambda: tracker, said.append)
    for step in range(1, 5):
        sink.step({"step": step, "loss": 1.0})
    sink.close()
    assert tracker.steps == [1]
    assert said == ["sink mine failed and gets nothing more; the run continues. ConnectionError: the server is gone"]


def test_a_tracker_that_does_not_start_is_reported() -> None:
    def start() -> Breaks:
        raise SystemExit("no account")  # as wandb does without a key

    said: list[str] = []
    sink = GuardedSink("mine", start, said.append)
    sink.close()
    assert len(said) == 1 and "SystemExit: no account" in said[0]


def test_a_slow_tracker_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls return while the tracker is stuck in its first; the end of the run waits a bounded time."""
    monkeypatch.setattr(guarded, "CLOSE_SECONDS", 0.05)
    release = threading.Event()

    class Stuck(Breaks):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            release.wait()

    said: list[str] = []
    sink = GuardedSink("mine", Stuck, said.append)
    for step in range(1000):
        sink.step({"step": step, "loss": 1.0})
    sink.close()
    release.set()
    assert len(said) == 1 and "did not finish" in said[0]


def test_a_package_that_is_missing_is_found_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    check_installed(config(tmp_path, to=["tensorboard"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "owpo_megatron\[wandb\]"'):
        check_installed(config(tmp_path, to=["wandb"]))


def test_every_sink_of_the_configuration_has_an_extra_in_setup() -> None:
    from owpo_megatron.sinks.make import TRACKERS

    setup = (Path(__file__).parents[2] / "setup.py").read_text()
    for name, (_, package) in TRACKERS.items():
        assert f'"{name}": ["{package}' in setup
