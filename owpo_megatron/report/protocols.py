"""The tables of the two protocols, and the curves of self-evolution (the paper's Tables 2 and 6, Figure 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from owpo_megatron.report import style
from owpo_megatron.report.comparison import Curves, draw_band, entry_colors, reference_used, score_text
from owpo_megatron.report.published import figure, find_published


def two_stage_table(table: Mapping[str, Any], paper: tuple[str, str] | None = None) -> Table:
    """A line a method: its best and its converged checkpoint, and what they are above the reference.

    Args:
        paper: (model, set) of the paper, for two columns of its numbers.
    """
    content = table["regimes"]["two-stage"]
    reference = content["reference_best"]
    out = _table("Two-stage protocol", table)
    equal = ["converged at equal total compute"] if table.get("equal_compute", True) else []
    for heading in ("best", "converged", "best above the reference", *equal):
        out.add_column(heading, justify="right")
    for heading in ("paper: best", "paper: converged") if paper else ():
        out.add_column(heading, justify="right")
    first = f"first stage: {table['reference']['method']}, {table['reference']['steps']} steps"
    out.add_row(first, score_text(reference), score_text(content["reference"]), "", *[""] * len(equal))
    for entry in content["entries"]:
        above = f"{entry['best']['mean'] - reference['mean']:+.3f}" if reference else "-"
        shown = (score_text(entry[name]) for name in ("best", "final"))
        beside = [_published(paper, entry["method"], table["metric"], place) for place in ("best", "converged")]
        total = [score_text(entry["equal_compute"])] * len(equal)
        out.add_row(entry["label"], *shown, above, *total, *(beside if paper else []))
    return out


def self_evolution_table(
    table: Mapping[str, Any],
    curves: Mapping[str, Curves],
    stages_of: Callable[[list[list[float]]], list[float]],
    paper: bool = False,
) -> Table:
    """A column a method, a row an iteration: the best score of its evaluations, mean over the seeds.

    Args:
        stages_of: cuts a held-out curve into the best scores of its stages.
        paper: add what the paper says of its Figure 5.
    """
    content, runs = table["regimes"]["self-evolution"], curves["self-evolution"]
    out = _table("Self-evolution", table)
    for label in runs:
        out.add_column(label, justify="right")
    out.add_row("prior", *[score_text(reference_used(table, "self-evolution"))] * len(runs))
    stages = {label: [stages_of(one["curve"]) for one in seeds.values()] for label, seeds in runs.items()}
    for index in range(max((len(rows[0]) for rows in stages.values()), default=0)):
        reached = [[row[index] for row in rows if index < len(row)] for rows in stages.values()]
        out.add_row(f"iteration {index + 1}", *(f"{sum(one) / len(one):.3f}" if one else "" for one in reached))
    entries = {entry["label"]: entry for entry in content["entries"]}
    out.add_row("converged", *(score_text(entries[label]["final"]) for label in runs))
    if table.get("equal_compute", True):
        out.add_row("at equal total compute", *(score_text(entries[label]["equal_compute"]) for label in runs))
    if paper:
        known = figure("figure5")
        told = [known.get(entries[label]["method"]) for label in runs]
        shown = [f"about {one['percent'] / 100:.2f} in {one['iterations']}" if one else "" for one in told]
        out.add_row(f"paper (prior {known['prior'] / 100:.2f})", *shown)
    return out


def _published(paper: tuple[str, str] | None, method: str, metric: str, place: str) -> str:
    found = find_published(paper[0], method, paper[1], metric, place) if paper else None
    return f"{found.percent / 100:.3f}" if found else ""


def draw_self_evolution(
    table: Mapping[str, Any], curves: Mapping[str, Curves], swaps: Sequence[int], file: Path
) -> Path:
    """Held-out curves over all stages, the prior as a dashed line, the swaps as dotted ones (Figure 5)."""
    runs, prior = curves["self-evolution"], reference_used(table, "self-evolution")
    figure, (axis,) = style.new_figure(1, 1, height=3.8)
    style.dress(axis, f"Self-evolution: {table['metric']} on held-out problems", percent=True)
    if prior:
        axis.axhline(prior["mean"], color=style.MUTED, linewidth=1.0, linestyle="--", label="prior")
    colors = entry_colors(list(runs), table["against"])
    for label, seeds in runs.items():
        curve = [one["curve"] for one in seeds.values()]
        rows = [[score for _, score in points] for points in curve]
        draw_band(axis, [int(step) for step, _ in curve[0]], rows, colors[label], label, label == table["against"], "o")
    style.mark_swaps(axis, swaps, name=True)
    style.legend(axis)
    axis.set_ylim(bottom=0)
    figure.savefig(file, metadata={"Software": None})
    return file


def _table(title: str, table: Mapping[str, Any]) -> Table:
    heading = f"[bold]{title}[/bold]: {table['metric']}, {table['steps']} steps, {len(table['seeds'])} seeds"
    out = Table(title=heading, title_justify="left", box=None, header_style="bold", padding=(0, 2, 0, 0))
    out.add_column("", no_wrap=True)
    return out
