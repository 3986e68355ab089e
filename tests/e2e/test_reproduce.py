"""`owpo reproduce` at the scale of two cores, from the command to the table: real runs, engines and evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from owpo import Owpo

from owpo_megatron.reproduce.artefacts import ARTEFACTS

pytestmark = pytest.mark.process

SECONDS = 840


def reproduce(name: str, tmp_path: Path, *arguments: str, seconds: int = SECONDS) -> tuple[dict[str, Any], str]:
    """The result's JSON file and what was printed."""
    command = Owpo(tmp_path / "logs", "reproduce", name, "--scale", "cpu", "--out", str(tmp_path / "out"), *arguments)
    assert command.process.wait(seconds) == 0, command.stdout[-2000:] + command.stderr[-2000:]
    file = tmp_path / "out" / f"{name}.json"
    return (json.loads(file.read_text()) if file.is_file() else {}), command.stdout


@pytest.mark.extra
def test_a_figure_and_a_table_share_their_runs(tmp_path: Path, base_model: Path, server_url: str) -> None:
    """Three steps a run. Figure 4 trains four of Table 6's six runs; its dashed line is their DAPO run's best score.

    Not covered: several workers, and the runs that start from a suboptimal reference (the matrix has them).
    """
    short = ("--model", str(base_model), "--workers", "1", f"engine.urls=['{server_url}']")
    short += ("optimizer.steps=3", "eval.every=3", "rollout.prompts_per_step=4", "rollout.max_rounds=2")
    figure, printed = reproduce("figure4", tmp_path, *short)
    assert "4 runs, 0 of them finished before" in printed
    assert (tmp_path / "out" / "figure4.png").read_bytes()[:4] == b"\x89PNG"
    (dapo,) = (values for label, _, _, place, values in figure["values"] if (label, place) == ("dapo", "best"))
    assert figure["reference"] == {"aime24": dapo[0]}
    assert set(figure["curves"]) == {"dapo", "mopd", "opd", "owpo"}

    table, printed = reproduce("table6", tmp_path, *short)
    assert "6 runs, 4 of them finished before" in printed
    rows = {(label, name, metric): values[0] for label, name, metric, _, values in table["values"]}
    assert len(rows) == 6 * 3 * 2 and all(0 <= value <= 1 for value in rows.values())
    for label in table["rows"]:
        assert rows[label, "amc", "pass@16"] >= rows[label, "amc", "pass@1"]
    lines = (tmp_path / "out" / "table6.md").read_text().splitlines()
    assert lines[2].startswith("| model | method | CIPHER-A Pass@1 | CIPHER-A Pass@16 | CIPHER-B Pass@1 ")
    # MOPD follows DAPO's settings in the literal reading: groups of equal verdicts are dropped
    mopd = Path(table["runs"]["mopd-s1"]) / "metrics.jsonl"
    assert any(json.loads(line).get("groups_dropped") for line in mopd.read_text().splitlines())

    before = sorted(file.stat().st_mtime_ns for file in (tmp_path / "out" / "runs").glob("*/eval/*/*.json"))
    again, printed = reproduce("table6", tmp_path, *short)
    assert "6 runs, 6 of them finished before" in printed and again == table
    assert sorted(file.stat().st_mtime_ns for file in (tmp_path / "out" / "runs").glob("*/eval/*/*.json")) == before


@pytest.mark.matrix
@pytest.mark.timeout(7200)
def test_all_of_them(tmp_path: Path, base_model: Path) -> None:
    """Every table and figure at its full length; 19 runs in all, each trained once."""
    trained = 0
    for name, one in ARTEFACTS.items():
        result, printed = reproduce(name, tmp_path, "--model", str(base_model), seconds=3600)
        if one.kind != "dynamics":
            count, _, finished = printed.split(" of them finished")[0].rpartition("\n")[2].partition(" runs, ")
            trained += int(count) - int(finished)
            assert len(result["values"]) == len(one.entries) * sum(cell[0] != "average" for cell in one.columns)
        if one.kind != "table":
            assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert trained == 19
