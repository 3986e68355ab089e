"""Tables and figures of the two protocols: the reference's line, methods with different numbers of iterations."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from owpo_megatron.experiments.protocols import best_of_stages
from owpo_megatron.report import comparison
from owpo_megatron.report.comparison import regime_table, write_comparison_figures
from owpo_megatron.report.protocols import draw_self_evolution, self_evolution_table, two_stage_table

CURVES: dict[str, Any] = {"two-stage": {"owpo": {"1": {"curve": [[0, 0.1], [40, 0.4]], "training": {}}}}}


def spread(value: float) -> dict[str, Any]:
    return {"seeds": {"1": value}, "mean": value, "low": None, "high": None, "count": 1}


def entry(label: str, final: float) -> dict[str, Any]:
    scores = {name: spread(final) for name in ("final", "best", "auc", "equal_compute")}
    return {"label": label, "method": label, **scores, "total_token_passes": spread(1000.0)}


def table_of(regime: str, **more: Any) -> dict[str, Any]:
    """A table of one regime; the reference ended at 0.3188 and was at 0.3719 at its best, as the paper's DAPO."""
    content = {"base": 0.1, "reference": spread(0.3188), "reference_best": spread(0.3719)}
    content["reference_used"] = spread(0.3719)
    content["entries"] = [entry("owpo", 0.40), entry("mopd", 0.37)]
    reference = {"method": "dapo", "steps": 400, "weights": "best"}
    shared = {"metric": "pass@1", "against": "owpo", "seeds": [1], "steps": 40, "equal_compute": True}
    return shared | {"reference": reference, "regimes": {regime: content}} | more


def shown(table: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=200).print(table)
    return text.getvalue()


def dashed_lines(figure: Figure) -> list[float]:
    lines = [line for axis in figure.axes for line in axis.lines if line.get_linestyle() == "--"]
    return [float(line.get_ydata()[0]) for line in lines]  # type: ignore[index]


@pytest.mark.parametrize(("weights", "height"), [("best", 0.3719), ("final", 0.3188)])
def test_the_dashed_line_is_the_reference_that_was_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, height: float
) -> None:
    """The paper's DAPO: 37.19 at its best, 31.88 at the end; the two-stage protocol refers to the best."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    table = table_of("two-stage")
    table["reference"]["weights"] = weights
    table["regimes"]["two-stage"]["reference_used"] = spread(height)
    write_comparison_figures(table, CURVES, tmp_path)
    assert dashed_lines(drawn[0]) == [height]
    title = shown(regime_table(table, "two-stage"))
    assert f"reference {height:.3f}" in title
    assert ("best of 400 steps" in title) is (weights == "best")


def test_methods_may_have_different_numbers_of_iterations(tmp_path: Path) -> None:
    """OWPO four stages, MOPD six (paper, Figure 5): the shorter column ends in blanks, the figure has both."""
    table = table_of("self-evolution")
    curves: dict[str, Any] = {
        "self-evolution": {
            label: {"1": {"curve": [[10 * n, 0.3 + 0.02 * n] for n in range(stages + 1)], "training": {}}}
            for label, stages in (("owpo", 4), ("mopd", 6))
        }
    }
    lines = shown(self_evolution_table(table, curves, partial(best_of_stages, stage_steps=10))).splitlines()
    cells = {line.split("  ")[0].strip(): line.split() for line in lines}
    assert cells["iteration 4"] == ["iteration", "4", "0.380", "0.380"]
    assert cells["iteration 6"] == ["iteration", "6", "0.420"]
    assert cells["prior"][1:] == ["0.372", "0.372"]
    assert draw_self_evolution(table, curves, [10, 20, 30, 40, 50], tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"


def test_columns_of_equal_compute_can_be_left_out() -> None:
    with_column, without = table_of("two-stage"), table_of("two-stage", equal_compute=False)
    assert "equal total compute" in shown(two_stage_table(with_column))
    assert "equal" not in shown(two_stage_table(without))
    assert any("equal" in head for head in comparison._lines(with_column, "two-stage")[0])
    assert not any("equal" in head for head in comparison._lines(without, "two-stage")[0])
    evolution = table_of("self-evolution", equal_compute=False)
    assert "equal" not in shown(self_evolution_table(evolution, {"self-evolution": {}}, list))


def test_the_papers_numbers_stand_beside_the_protocols() -> None:
    """Table 2's OWPO and MOPD of Qwen3-8B-Base, best and converged; Figure 5's text for self-evolution."""
    text = shown(two_stage_table(table_of("two-stage"), ("Qwen3-8B-Base", "aime24")))
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert (
        "paper: best" in text and lines["owpo"][-2:] == ["0.444", "0.422"] and lines["mopd"][-2:] == ["0.378", "0.360"]
    )
    assert "paper" not in shown(two_stage_table(table_of("two-stage")))
    curves = {"self-evolution": {label: {"1": {"curve": [[0, 0.3], [10, 0.4]]}} for label in ("owpo", "mopd")}}
    stages = partial(best_of_stages, stage_steps=10)
    told = shown(self_evolution_table(table_of("self-evolution"), curves, stages, paper=True))
    assert "paper (prior 0.30)" in told and "about 0.40 in 4" in told and "about 0.37 in 6" in told
