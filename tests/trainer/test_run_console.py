"""The lines that a person watching a run reads."""

from __future__ import annotations

import pytest

from owpo_megatron.trainer.console import RunConsole

LINE = {
    "reward_mean": 0.0,
    "groups": 0,
    "groups_dropped": 64,
    "verifier": {"no_answer": 450, "wrong": 62},
    "seconds": {"total": 1.0},
}


def test_steps_without_anything_to_learn_from_are_explained_once(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole(4)
    console.step(LINE | {"step": 1, "groups": 1})
    assert "nothing to learn from" not in capsys.readouterr().out
    for step in (2, 3):
        console.step(LINE | {"step": step})
    said = capsys.readouterr().out
    assert said.count("nothing to learn from") == 1 and "450 no_answer, 62 wrong" in said
