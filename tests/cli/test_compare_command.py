"""Announcement of `owpo compare`, its progress in a file, and the explanation of its columns."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from owpo_megatron.cli import compare as command
from owpo_megatron.experiments.compare import plan, specs_of
from owpo_megatron.experiments.lab import Lab


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """Two methods and two seeds, and a ratchet that the file asks for."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    raw: dict[str, Any] = {
        "out_dir": str(tmp_path),
        "run": {
            "model": {"path": str(tmp_path / "model")},
            "data": {"source": "task:cipher"},
            "rollout": {"prompts_per_step": 16},
            "optimizer": {"steps": 30},
            "eval": {"every": 5},
            "reference": {"every": 2},
        },
        "methods": ["owpo", "dapo"],
        "seeds": [1, 2],
    }
    (tmp_path / "lab.yaml").write_text(yaml.safe_dump(raw))
    return Lab.load(tmp_path / "lab.yaml")


def test_the_number_of_runs_and_every_reference_are_announced(lab: Lab) -> None:
    first, *entries = command.announcement(lab, plan(lab))
    assert first == ("8 runs: 4 compared, 2 references (dapo, 10 steps), 2 longer ones for the column equal compute")
    assert entries == [
        "  owpo: 30 steps, the trained reference of its seed, never swapped",
        "  dapo: 30 steps, no reference",
    ]


def test_a_lab_without_a_trained_reference_compares_the_ratchet(lab: Lab, tmp_path: Path) -> None:
    own = Lab.load(tmp_path / "lab.yaml", ["reference=null"])
    first, owpo, _ = command.announcement(own, plan(own))
    assert first == "4 runs: 4 compared"
    assert owpo == "  owpo: 30 steps, its own initial policy as reference, swapped every 2 steps"


def test_finished_runs_are_counted(lab: Lab) -> None:
    folder = plan(lab)[0].run.folder(lab.root)
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    assert command.announcement(lab, plan(lab))[0].endswith("; 1 of them finished before")


def test_progress_in_a_file_names_what_is_under_way(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """No terminal: a line when a run starts, lines in between with its steps, a line when it ends."""
    shown = io.StringIO()
    monkeypatch.setattr(command, "out", Console(file=shown, soft_wrap=True))
    monkeypatch.setattr(command, "HEARTBEAT_SECONDS", 0.02)
    specs = specs_of(plan(lab))
    folder = specs[0].folder(lab.root)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(
        '{"step": 1, "seconds": {}}\n{"step": 1, "eval": {}}\n{"step": 2, "seconds": {}}\n'
    )
    with command.progress(specs, lab.root) as tell:
        tell("started", specs[0])
        while "at step" not in shown.getvalue():
            pass
        tell("done", specs[0])
    text = shown.getvalue()
    assert f"started {specs[0].label} (0 of 8)" in text
    assert f"0 of 8 done; {specs[0].label} at step 2/30" in text
    assert f"done    {specs[0].label} (1 of 8)" in text


def test_every_column_has_its_legend() -> None:
    from owpo_megatron.report.comparison import SCORES

    for heading in (*SCORES.values(), "ahead", "±", "token passes"):
        assert f"{heading}:" in command.LEGEND or heading == "±" and "±: half" in command.LEGEND
