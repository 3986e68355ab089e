"""Verdicts on the numbers of `owpo replay`; real runs that are replayed are in tests/faults (kinds_numbers.py)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from owpo_megatron.api.replay import Replay, Replayed, _scratch, replay
from owpo_megatron.errors import UserError
from owpo_megatron.run.files import locked
from owpo_megatron.run.layout import RunFolder


@pytest.mark.parametrize(
    ("logged", "found", "exact", "verdict"),
    [
        (0.5, 0.5, False, "equal"),
        (0.5, 0.500001, False, "close"),
        (0.5, 0.500001, True, "differs"),
        (0.5, 0.51, False, "differs"),
        (1e-8, 3e-7, False, "close"),
        (None, 0.5, False, "not logged"),
        (0.5, None, False, "differs"),
        ("a1", "a1", False, "equal"),
        ("a1", "b2", False, "differs"),
    ],
)
def test_verdicts(logged: object, found: object, exact: bool, verdict: str) -> None:
    assert Replayed("x", logged, found, exact).verdict == verdict


def fields(loss: float, weights: str) -> tuple[Replayed, ...]:
    exact = weights == "a1"
    return Replayed("loss", 0.5, loss, exact), Replayed("weights", "a1", weights, exact)


def test_weights_may_differ_only_with_rounding() -> None:
    assert Replay(1, 0, fields(0.5, "a1")).agrees
    assert Replay(1, 0, fields(0.500001, "b2")).agrees, "another kind of machine"
    assert not Replay(1, 0, fields(0.5, "b2")).agrees, "the same numbers of other weights"
    assert not Replay(1, 0, fields(0.500001, "a1")).agrees, "another number of the same weights"
    assert not Replay(1, 0, fields(0.5, "a1"), failure="it ended").agrees


def test_what_cannot_be_replayed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match="has no config.yaml"):
        replay(run, 1)
    run.path.mkdir()
    settings = {"model": {"path": "m"}, "data": {"source": "task:cipher"}}
    run.config.write_text(json.dumps(settings))
    run.metrics.write_text('{"step": 1, "seconds": {}}\n\0\0\n')
    with pytest.raises(UserError, match="--step = 5: the run has done 1 steps"):
        replay(run, 5)
    with pytest.raises(UserError, match="--step = 1: step 1 has no rollouts"):
        replay(run, 1)
    run.config.write_text(
        json.dumps(settings | {"reference": {"refresh": "best_of_stage", "every": 2}, "eval": {"every": 1}})
    )
    with pytest.raises(UserError, match="swaps depend on evaluations"):
        replay(run, 1)


def test_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leftovers of a killed replay go; one that works is left alone; a read-only run is replayed elsewhere."""
    run = RunFolder(tmp_path)
    left = tmp_path / "replay" / "left"
    left.parent.mkdir()
    left.touch()
    with _scratch(run) as scratch:
        assert scratch.path == tmp_path / "replay" and not left.exists()
        scratch.path.mkdir()
        with locked(scratch.lock), pytest.raises(UserError, match="another owpo replay of this run"), _scratch(run):
            pass
        assert scratch.lock.exists()
    assert not scratch.path.exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with _scratch(run) as scratch:
        scratch.path.mkdir()
        assert not scratch.path.is_relative_to(tmp_path)
    assert not scratch.path.parent.exists() and list(tmp_path.iterdir()) == []
