"""`owpo methods`: the catalogue as a table and as JSON. The figure is tests/methods/test_propositions.py's part."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from owpo_megatron.cli.main import app
from owpo_megatron.methods import catalogue


def test_the_table_and_the_file_have_every_method(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["methods", "--json", str(tmp_path / "methods.json")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "methods.json").read_text())["methods"]
    assert [row["name"] for row in rows] == list(catalogue())
    assert all(name in done.output for name in catalogue())
    grpo = next(row for row in rows if row["name"] == "grpo")
    assert grpo["needs"] == {"old": True, "reference": "all", "entropy": False}
    assert (grpo["coupling"], grpo["divisor"], grpo["groups"]) == ("token", "samples", "all")
    assert grpo["settings"] == {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.001} and "2402.03300" in grpo["paper"]
    assert grpo["hyper"][2]["bounds"] == "at least 0"
