"""Score tables in the layout of the paper's, with its own figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from owpo_megatron.report.score_plot import write_score_figure
from owpo_megatron.report.scores import Scored, details, score_tables, write_tables

# Tables 5 and 6 of the paper, Qwen-2.5: Pass@1 and Pass@16 of AIME24, AIME25 and AMC.
PAPER = {
    ("GRPO", "best"): [(32.08, 50.24), (11.77, 24.56), (67.39, 81.24)],
    ("GRPO", "converged"): [(29.79, 48.38), (12.60, 26.99), (64.87, 86.67)],
    ("OWPO", "best"): [(41.67, 55.84), (17.92, 29.20), (72.14, 87.41)],
    ("OWPO", "converged"): [(39.90, 54.10), (18.44, 31.18), (74.02, 87.29)],
}


def scores(title: str, **metrics: float) -> dict[str, Any]:
    values = {
        name.replace("_", "@"): {"value": value / 100, "low": value / 200, "high": value / 100}
        for name, value in metrics.items()
    }
    rest = {"problems": 30, "samples": 32, "response_length": 700.0, "truncated_share": 0.125, "verdicts": {"ok": 1}}
    return {"title": title, "metrics": values, **rest}


def paper() -> list[Scored]:
    out = []
    for (method, place), pairs in PAPER.items():
        sets = {
            title.lower(): scores(title, pass_1=first, pass_16=many)
            for title, (first, many) in zip(("AIME24", "AIME25", "AMC"), pairs, strict=True)
        }
        out.append(Scored("Qwen-2.5", method, place, sets))
    return out


def test_tables_2_5_and_6() -> None:
    main, best, converged = score_tables(paper())
    assert [one.title for one in (main, best, converged)] == [
        "Pass@1",
        "best checkpoint: Pass@1 and Pass@16",
        "converged checkpoint: Pass@1 and Pass@16",
    ]
    assert main.columns[:3] == [("AIME24", "best"), ("AIME24", "converged"), ("AIME25", "best")]
    assert main.columns[-2:] == [("Average", "best"), ("Average", "converged")]
    assert [round(value, 2) for value in main.cells[1] if value] == [
        *(41.67, 39.90, 17.92, 18.44, 72.14, 74.02),
        *(43.91, 44.12),  # the paper's averages
    ]
    assert best.columns[-2:] == [("Average", "Pass@1"), ("Average", "Pass@16")]
    assert [round(value, 2) for value in best.cells[0][-2:] if value] == [37.08, 52.01]
    assert [round(value, 2) for value in converged.cells[1][-2:] if value] == [44.12, 57.52]


def test_table_3_and_what_was_not_evaluated() -> None:
    """Accuracy sets make a table of their own; a gap is shown as one, and makes no average."""
    rows = [
        Scored("Qwen-2.5", "GRPO", "best", {"gpqa": scores("GPQA", pass_1=34.34)}),
        Scored(
            "Qwen-2.5",
            "OWPO",
            "best",
            {"gpqa": scores("GPQA", pass_1=41.03), "mmlu_pro": scores("MMLU-Pro", pass_1=46.85)},
        ),
    ]
    (table,) = score_tables(rows)
    assert (table.title, table.columns[:2]) == ("Mean accuracy", [("GPQA", "best"), ("MMLU-Pro", "best")])
    assert table.cells[0][0] == 34.34 and table.cells[0][1:] == [None, None]
    assert [round(value, 2) for value in table.cells[1] if value] == [41.03, 46.85, 43.94]


def test_one_model_has_no_checkpoint() -> None:
    (table,) = score_tables([Scored("m", "", "", {"amc": scores("AMC", pass_1=50, pass_16=80)})])
    assert (table.title, table.columns) == ("Pass@1 and Pass@16", [("AMC", "Pass@1"), ("AMC", "Pass@16")])


def test_a_base_beside_a_run_makes_no_empty_table() -> None:
    """The base was evaluated without checkpoints and for other Pass@k; each table has rows and columns with scores."""
    base = Scored("m", "base", "", {"held": scores("held", pass_1=10, pass_4=20)})
    run = Scored("m", "owpo", "best", {"held": scores("held", pass_1=30, pass_8=60)})
    (table,) = score_tables([base, run])
    assert table.rows == [("m", "base"), ("m", "owpo")]
    assert [name for _, name in table.columns] == ["Pass@1", "Pass@4", "Pass@8"]
    assert table.cells == [[10, 20, None], [30, None, 60]]
    converged = Scored("m", "owpo", "converged", {"held": scores("held", pass_1=25, pass_8=50)})
    first, best, last = score_tables([base, run, converged])
    assert (first.title, first.cells) == ("Pass@1", [[10, 10], [30, 25]])
    assert best.title.startswith("best checkpoint") and last.cells == [[10, 20, None], [25, None, 50]]
    alone = Scored("m", "dapo", "best", {"other": scores("other", pass_1=1, pass_2=2)})
    assert [("m", "dapo") in one.rows for one in score_tables([run, converged, alone])] == [True, True, False]


def test_what_a_person_sees_and_what_stays(tmp_path: Path) -> None:
    tables = score_tables(paper())
    console = Console(width=140, record=True, file=(tmp_path / "shown").open("w"))
    console.print(tables[0].rich())
    console.print(details(paper()))
    shown = console.export_text()
    assert "AIME24" in shown and "43.91" in shown and "30 x 32" in shown and "20.8 - 41.7" in shown
    write_tables(tmp_path / "table.json", tables, paper())
    kept = json.loads((tmp_path / "table.json").read_text())
    assert kept["tables"][0]["rows"] == [["Qwen-2.5", "GRPO"], ["Qwen-2.5", "OWPO"]]
    assert kept["scores"][0]["sets"]["amc"]["metrics"]["pass@16"]["value"] == pytest.approx(0.8124)
    figure = write_score_figure(tmp_path / "scores.png", paper())
    assert figure.read_bytes().startswith(b"\x89PNG") and figure.stat().st_size > 10_000
