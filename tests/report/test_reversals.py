"""The figure and the table of force reversals: measured shares beside those that were asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from owpo_megatron.methods.metrics import BETAS
from owpo_megatron.report.reproduction import draw
from owpo_megatron.report.reversals import IN_TABLE, reversal_table
from owpo_megatron.reproduce.execute import table_of


def curve(measured: list[float], *factors: float) -> dict[str, Any]:
    """Seeds of one row: what is asked grows with beta's place in BETAS, by a factor for each seed."""
    reversed_by_step = [[step, value] for step, value in enumerate(measured, 1)]
    asked = [
        [[step, [factor * place for place in range(len(BETAS))]] for step, _ in reversed_by_step] for factor in factors
    ]
    return {str(seed): {"reversed": reversed_by_step, "turned": turned} for seed, turned in enumerate(asked or [[]])}


@pytest.fixture
def result() -> dict[str, Any]:
    curves = {
        "sym_dapo, beta 0.01": curve([0.1, 0.3], 0.02),
        "opd": curve([0.5, 0.5]),
        "owpo": curve([0.0, 0.0], 0.01, 0.03),
    }
    shared = {"name": "reversals", "kind": "reversals", "title": "Force reversal", "model": "m", "betas": list(BETAS)}
    return shared | {"rows": list(curves), "curves": curves}


def test_the_table_has_what_was_measured_and_what_was_asked(result: dict[str, Any]) -> None:
    """Sym-DAPO: 0.1 and 0.3, mean 20 %. OWPO by seeds 0.01 and 0.03: 0.02 times the coefficient's place."""
    table = table_of(result)
    assert table == reversal_table(result)
    places = [BETAS.index(beta) for beta in IN_TABLE]
    assert [name for _, name in table.columns] == ["measured", "0.001", "0.01", "0.1", "1", "10"]
    assert table.cells[0] == pytest.approx([20.0, *(2.0 * place for place in places)])
    assert table.cells[1] == [50.0, *[None] * 5]
    assert table.cells[2] == pytest.approx([0.0, *(2.0 * place for place in places)])


def test_the_figure_shows_both_beside_each_other(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    draw(result, tmp_path / "reversals.png")
    left, right = drawn[0].axes
    lines = {str(line.get_label()): list(line.get_ydata()) for line in (*left.lines, *right.lines)}  # type: ignore[call-overload]
    assert lines["OWPO itself (measured)"] == [0.0, 0.0]
    assert lines["with KL, β = 10"] == pytest.approx([0.16, 0.16])
    assert lines["tokens of Sym-DAPO, β = 0.01"] == pytest.approx([0.02 * place for place in range(9)])
    (dot,) = (line for line in right.lines if line.get_marker() == "o" and len(line.get_xdata()))  # type: ignore[arg-type]
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([0.01], [pytest.approx(0.2)])  # type: ignore[call-overload]
    assert right.get_xscale() == "log" and right.get_xlabel() and left.get_ylabel()
