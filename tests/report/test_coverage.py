"""Coverage gained and lost, and where an update went, against numbers worked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from owpo_megatron.cli.main import app
from owpo_megatron.errors import UserError
from owpo_megatron.report.coverage import answer_entropy, coverage, read_problems
from owpo_megatron.report.drift import drift, matrix_drift


def line(name: str, right: int, samples: int = 4, **more: Any) -> dict[str, Any]:
    return {"id": name, "correct": right, "verdicts": ["ok"] * right + ["wrong"] * (samples - right)} | more


BASE = [line("a", 1), line("b", 2), line("c", 0), line("d", 0), line("e", 1)]
MODEL = [line("a", 4), line("b", 0), line("c", 3), line("d", 0), line("e", 2)]


def test_gained_and_lost_by_hand() -> None:
    found = coverage(BASE, list(reversed(MODEL)))
    assert (found.both, found.gained, found.lost, found.neither) == (2, ("c",), ("b",), 1)
    assert found.retained == pytest.approx(2 / 3) and found.base_entropy is None


def test_entropy_of_answers_by_hand() -> None:
    """Half, a quarter, a quarter: 1.5 ln 2. Mean over two problems of which one is certain: half of it."""
    assert answer_entropy(["4", "4", "5", "6"]) == pytest.approx(1.5 * math.log(2))
    lines = [line("a", 1, answers=["4", "4", "5", "6"]), line("b", 1, answers=["1"] * 4)]
    assert coverage(lines, lines).model_entropy == pytest.approx(0.75 * math.log(2))


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UserError, match="only one of the two has this problem"):
        coverage(BASE, MODEL[:-1])
    with pytest.raises(UserError, match="same number of samples"):
        coverage(BASE, [line(one["id"], 1, samples=8) for one in MODEL])


def test_from_the_command_line(tmp_path: Path) -> None:
    files = [tmp_path / "base.jsonl", tmp_path / "model.jsonl"]
    for file, lines in zip(files, (BASE, MODEL), strict=True):
        file.write_text("".join(json.dumps(one) + "\n" for one in lines))
    result = CliRunner().invoke(app, ["coverage", *map(str, files), "--ids", "--json", str(tmp_path / "out.json")])
    assert result.exit_code == 0 and "gained: c" in result.output and "66.7% of the base's" in result.output
    assert json.loads((tmp_path / "out.json").read_text())["lost"] == ["b"]
    with pytest.raises(UserError, match="a line per problem"):
        files[0].write_text('{"step": 1}\n')
        read_problems(files[0])


# ---------------------------------------------------------------------------------------------- drift
def test_an_update_along_the_leading_direction_is_all_principal() -> None:
    """diag(4, 2, 1), the 4 becomes 5: update 1 of norm sqrt 21; 1 of 9 weights; the spectrum moves as much."""
    old = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    new = old.clone()
    new[0, 0] = 5.0
    found = matrix_drift("w", old, new, leading=1)
    assert (found.changed, found.principal, found.by_chance) == pytest.approx((1 / 9, 1.0, 1 / 9))
    assert (found.update_norm, found.spectrum, found.rotation) == pytest.approx((21**-0.5, 21**-0.5, 0.0), abs=1e-12)


def test_an_update_off_it_is_not() -> None:
    """An entry between the two trailing directions: nothing in the leading one, which does not turn."""
    old = torch.diag(torch.tensor([4.0, 2.0, 1.0]))
    new = old.clone()
    new[1, 2] = 0.5
    found = matrix_drift("w", old, new, leading=1)
    assert (found.principal, found.rotation) == pytest.approx((0.0, 0.0), abs=1e-12) and found.spectrum > 0


def test_a_quarter_turn_is_a_full_rotation() -> None:
    old = torch.diag(torch.tensor([4.0, 1.0]))
    assert matrix_drift("w", old, old.flip(0), leading=1).rotation == pytest.approx(1.0)


def test_a_change_below_bf16_moves_no_weight() -> None:
    old = torch.ones(4, 4) + torch.eye(4)
    found = matrix_drift("w", old, old * (1 + 1e-5), leading=2)
    assert found.changed == 0.0 and found.update_norm == pytest.approx(1e-5, rel=1e-2)


def test_folders_are_compared_matrix_by_matrix(tmp_path: Path) -> None:
    for name, shift in (("old", 0.0), ("new", 0.5)):
        (tmp_path / name).mkdir()
        torch.manual_seed(1)
        save_file({"w": torch.randn(4, 6) + shift, "bias": torch.randn(4)}, tmp_path / name / "model.safetensors")
    (found,) = drift(tmp_path / "old", tmp_path / "new", leading=2)
    assert found.name == "w" and found.changed == 1.0 and found.by_chance == pytest.approx(4 / 24)
    result = CliRunner().invoke(app, ["drift", str(tmp_path / "old"), str(tmp_path / "new"), "--leading", "2"])
    assert result.exit_code == 0 and "100.00%" in result.output
    with pytest.raises(UserError, match="has no"):
        list(drift(tmp_path, tmp_path / "new"))
