"""`owpo methods`: the catalogue as a table and as JSON. The figure is tests/methods/test_propositions.py's part."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from owpo_megatron.cli.main import app
from owpo_megatron.errors import UserError
from owpo_megatron.methods import catalogue


def test_the_table_and_the_file_have_every_method(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["methods", "--json", str(tmp_path / "methods.json")])
    assert done.exit_code == 0, done.output
    rows = json.loads((tmp_path / "methods.json").read_text())["methods"]
    assert [row["name"] for row in rows] == list(catalogue())
    assert all(name in done.output for name in catalogue())
    grpo = next(row for row in rows if row["name"] == "grpo")
    assert {name: value for name, value in grpo["needs"].items() if value} == {"old": True, "reference": "all"}
    assert (grpo["kind"], next(row for row in rows if row["name"] == "rloo")["kind"]) == ("objective", "advantage")
    assert (grpo["coupling"], grpo["divisor"], grpo["groups"]) == ("token", "samples", "all")
    assert (
        grpo["settings"] == {"clip_low": 0.2, "clip_high": 0.2, "beta": 0.001, "penalty": "k3"}
        and "2402.03300" in grpo["paper"]
    )
    assert grpo["hyper"][2]["bounds"] == "at least 0"


@pytest.mark.parametrize(
    ("options", "inside", "outside"),
    [
        (["--kind", "advantage"], ["rloo", "gdpo"], ["gspo", "owpo"]),
        (["--coupling", "group"], ["disco", "real"], ["gspo"]),
        (["--needs", "entropy"], ["entropy_mask", "entropy_shaped"], ["dapo"]),
        (["2506.13585"], ["cispo"], ["sapo"]),
        (["--kind", "objective", "geometric"], ["gspo"], ["gmpo", "dr_grpo"]),
    ],
)
def test_filters(options: list[str], inside: list[str], outside: list[str]) -> None:
    done = CliRunner().invoke(app, ["methods", *options])
    names = [line.split()[0] for line in done.output.splitlines() if line and not line.startswith(" ")]
    assert done.exit_code == 0 and set(inside) <= set(names) and not set(outside) & set(names)


def test_a_filter_that_nothing_can_pass_is_refused() -> None:
    done = CliRunner().invoke(app, ["methods", "--kind", "advantages"])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith("--kind = advantages: use one of advantage, objective")
