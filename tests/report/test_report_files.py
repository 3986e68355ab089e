"""Table, figures, page, benchmark results. Whether a figure looks right is for eyes; here: what it is drawn of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from owpo_megatron import methods
from owpo_megatron.bench.result import BenchResult
from owpo_megatron.cli.main import app
from owpo_megatron.report import plots
from owpo_megatron.report.plots import FIGURES
from owpo_megatron.report.table import rows, summary_table
from owpo_megatron.run.metrics_reader import RunMetrics, read_run


def full_line(step: int, every: int = 4, group_size: int = 4) -> dict[str, Any]:
    """A line with every field of docs/metrics.md; right after a swap nothing deviates."""
    since = (step - 1) % every
    line: dict[str, Any] = {
        "step": step, "stage": (step - 1) // every, "n_active": group_size - since, "reward_mean": 0.1 * step,
        "groups": 8, "groups_dropped": 2, "rounds": 1, "updates": 2, "loss": -0.01, "grad_norm": 0.5, "lr": 1e-4,
        "ratio_mean": 1.0, "clip_fraction": 0.01, "kl_old": 0.001, "w_mean": 1.0 - 0.01 * since, "w_at_low": 0.02,
        "w_at_high": 0.01, "ref_id": (step - 1) // every, "ref_step": (step - 1) // every * every,
        "policy_version": step - 1, "entropy": 0.8, "mismatch": 1e-6, "response_length": 12.5, "truncated_share": 0.1,
        "verifier": {"ok": 10, "wrong": 20, "no_answer": 2}, "tokens": 400, "tokens_generated": 500,
        "active_tokens": 200, "prompts_seen": 10 * step,
        "seconds": {"rollout": 1.0, "verify": 0.1, "update": 0.8, "sync": 0.1, "total": 2.1},
    }  # fmt: skip
    if since:
        line |= {"kl_ref": 0.01, "abs_delta": 0.02, "reversed_fraction": 0.0, "delta_hist": [1] * 7 + [9, 9] + [1] * 7}
        line |= {"case_1": 0.3, "case_2": 0.2, "case_3": 0.2, "case_4": 0.2}
    if step % every == 0:
        line["seconds"]["swap"] = 0.001
    return line


def make_run(folder: Path, lines: list[dict[str, Any]]) -> RunMetrics:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_run(folder)


def evaluation(step: int, score: float) -> dict[str, Any]:
    return {"step": step, "eval": {"pass@1": score, "pass@8": score + 0.2, "problems": 10, "samples": 8}}


KINDS: dict[str, list[dict[str, Any]]] = {
    "full": [evaluation(0, 0.2), *(full_line(step) for step in range(1, 10)), evaluation(9, 0.7)],
    "one step": [full_line(1)],
    "bare": [{"step": 1}, {"step": 2, "reward_mean": 0.5}],
    "evaluations only": [evaluation(0, 0.2)],
    "nothing": [],
    "zeros": [{**full_line(1), "reward_mean": 0.0, "mismatch": 0.0, "delta_hist": [0] * 16, "verifier": {"ok": 0}}],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_is_drawn_of_every_run(kind: str, figure: str, tmp_path: Path) -> None:
    FIGURES[figure](make_run(tmp_path / "run", KINDS[kind])).savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_panels_without_data_say_so(tmp_path: Path) -> None:
    figure = FIGURES["reweighting"](make_run(tmp_path / "run", KINDS["bare"]))
    notes = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert "this method has no weights" in notes and "no reference tokens were logged" in notes


def test_the_reward_panel_shows_the_reward(tmp_path: Path) -> None:
    figure = FIGURES["learning"](make_run(tmp_path / "run", KINDS["full"]))
    raw = figure.axes[0].lines[0]
    assert list(raw.get_xdata()) == list(range(1, 10))
    assert list(raw.get_ydata()) == pytest.approx([0.1 * step for step in range(1, 10)])


def test_the_histogram_of_deviations_spans_what_the_methods_count() -> None:
    """The report reads files without torch, so the span is defined twice."""
    assert plots.DELTA_RANGE == methods.DELTA_RANGE


def test_facts_of_a_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", KINDS["full"])
    facts = rows(run)
    assert facts["pass@1"] == "20.0 % -> 70.0 %"
    assert facts["swaps"] == "2 (after steps 4, 8)"
    assert facts["steps"] == "9"
    assert facts["seconds per step"] == "2.10"
    assert "engine" not in facts


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "one", KINDS["full"]), make_run(tmp_path / "two", KINDS["bare"])]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(runs))
    text = console.export_text()
    assert re.search(r"one +two", text)
    assert re.search(r"pass@1 +20.0 % -> 70.0 % +-", text)


def test_the_report_command_writes_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "<b>run", KINDS["full"]).folder
    (folder / "config.yaml").write_text("name: '<script>'\n")
    result = CliRunner().invoke(app, ["report", str(folder)])
    assert result.exit_code == 0, result.output
    page = (folder / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(FIGURES) == len(list((folder / "report").glob("*.png")))
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<b>run" not in page and "<script>" not in page
    assert "20.0 % -&gt; 70.0 %" in page


def test_the_table_alone(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", KINDS["full"]).folder
    result = CliRunner().invoke(app, ["report", "--no-figures", str(folder)])
    assert result.exit_code == 0 and "pass@1" in result.output
    assert not (folder / "report").exists()


def test_a_benchmark_carries_machine_and_versions(tmp_path: Path) -> None:
    from owpo_megatron.launch.machine import machine, versions

    result = BenchResult(machine(), versions(), "owpo bench swap", [{"parameters": 1000, "swap_ms": 0.25}])
    result.write(tmp_path / "deep" / "swap.json")
    written = json.loads((tmp_path / "deep" / "swap.json").read_text())
    assert list(written) == ["machine", "versions", "command", "rows"]
    assert written["rows"] == [{"parameters": 1000, "swap_ms": 0.25}]
    assert written["machine"]["cores"] >= 1 and written["versions"]["torch"]
    assert [column.header for column in result.table().columns] == ["parameters", "swap_ms"]
