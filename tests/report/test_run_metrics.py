"""Reading a run folder: columns, swaps, half-written and repeated lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from owpo_megatron.errors import UserError
from owpo_megatron.run.metrics_reader import Series, last_mean, read_run, smoothed


def write(folder: Path, *lines: dict[str, Any], tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return folder


def test_columns_leave_gaps_out(tmp_path: Path) -> None:
    run = read_run(
        write(
            tmp_path,
            {"step": 1, "loss": 0.5, "seconds": {"rollout": 2.0, "total": 3.0}},
            {"step": 2, "seconds": {"update": 1.0}},
            {"step": 3, "loss": 0.25, "kl_ref": None},
        )
    )
    assert run.column("loss") == Series([1, 3], [0.5, 0.25])
    assert run.column("seconds.rollout") == Series([1], [2.0])
    assert run.fields_under("seconds") == ["rollout", "total", "update"]
    assert not run.column("kl_ref") and not run.column("no_such_field")


def test_evaluations_stand_apart(tmp_path: Path) -> None:
    scores = {"pass@1": 0.1, "pass@16": 0.3, "pass@8": 0.2, "problems": 4, "samples": 16}
    run = read_run(write(tmp_path, {"step": 0, "eval": scores}, {"step": 1, "loss": 1.0}, {"step": 1, "eval": scores}))
    assert run.eval_fields() == ["pass@1", "pass@8", "pass@16"]
    assert run.eval_column("pass@8") == Series([0, 1], [0.2, 0.2])
    assert [line["step"] for line in run.steps] == [1]


def test_swaps_are_seen_by_their_time_or_by_the_reference(tmp_path: Path) -> None:
    """Step 2 swapped (timed, and used from step 3 on); the swap after the last step has only its time."""
    run = read_run(
        write(
            tmp_path,
            {"step": 1, "ref_step": 0},
            {"step": 2, "ref_step": 0, "seconds": {"swap": 0.001}},
            {"step": 3, "ref_step": 2},
            {"step": 4, "ref_step": 2, "seconds": {"swap": 0.001}},
        )
    )
    assert run.swaps() == [2, 4]


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, {"step": 1, "loss": 1.0}, tail='{"step": 2, "lo'))
    assert [line["step"] for line in run.steps] == [1]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 = nonsense"):
        read_run(tmp_path)


def test_a_step_that_was_trained_again_counts_once(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}))
    assert run.column("loss") == Series([1, 2], [1.0, 2.0])


def test_summary_and_configuration_may_be_missing(tmp_path: Path) -> None:
    run = read_run(write(tmp_path, {"step": 1}))
    assert run.summary == {} and run.setting("algorithm.name", "?") == "?"
    (tmp_path / "summary.json").write_text('{"steps": 1}')
    (tmp_path / "config.yaml").write_text("algorithm: {name: dapo, beta: null}\n")
    run = read_run(tmp_path)
    assert run.summary["steps"] == 1
    assert run.setting("algorithm.name") == "dapo"
    assert run.setting("algorithm.beta", 0.5) == 0.5


def test_no_run_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        read_run(tmp_path)


def test_smoothing_by_hand() -> None:
    # weights 0.5: (1), (0.5*1*0.5 + 0.5*3) / 0.75 = (0.25 + 1.5) / 0.75
    assert smoothed([1.0, 3.0], weight=0.5) == pytest.approx([1.0, 1.75 / 0.75])
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
    assert smoothed([]) == []


def test_last_mean() -> None:
    assert last_mean(Series([1, 2, 3], [1.0, 2.0, 6.0]), last=2) == 4.0
    assert last_mean(Series([], [])) is None
