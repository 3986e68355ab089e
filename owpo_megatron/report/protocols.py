"""The tables of the two protocols, and the curves of self-evolution (the paper's Tables 2 and 6, Figure 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from owpo_megatron.report import style
from owpo_megatron.report.comparison import Curves, draw_band, entry_colors, score_text


def two_stage_table(table: Mapping[str, Any]) -> Table:
    """A line a method: its best and its converged checkpoint, and what they are above the reference."""
    content = table["regimes"]["two-stage"]
    reference = content["reference_best"]
    out = _table("Two-stage protocol", table)
    for heading in ("best", "converged", "best above the reference", "converged at equal total compute"):
        out.add_column(heading, justify="right")
    first = f"first stage: {table['reference']['method']}, {table['reference']['steps']} steps"
    out.add_row(first, score_text(reference), score_text(content["reference"]), "", "")
    for entry in content["entries"]:
        above = f"{entry['best']['mean'] - reference['mean']:+.3f}" if reference else "-"
        shown = (score_text(entry[name]) for name in ("best", "final"))
        out.add_row(entry["label"], *shown, above, score_text(entry["equal_compute"]))
    return out


def self_evolution_table(
    table: Mapping[str, Any],
    curves: Mapping[str, Curves],
    stages_of: Callable[[list[list[float]]], list[float]],
) -> Table:
    """A column a method, a row an iteration: the best score of its evaluations, mean over the seeds.

    Args:
        stages_of: cuts a held-out curve into the best scores of its stages.
    """
    content, runs = table["regimes"]["self-evolution"], curves["self-evolution"]
    out = _table("Self-evolution", table)
    for label in runs:
        out.add_column(label, justify="right")
    out.add_row("prior", *[score_text(content["reference"])] * len(runs))
    stages = {label: [stages_of(one["curve"]) for one in seeds.values()] for label, seeds in runs.items()}
    for index in range(max((len(rows[0]) for rows in stages.values()), default=0)):
        means = [sum(row[index] for row in rows) / len(rows) for rows in stages.values()]
        out.add_row(f"iteration {index + 1}", *(f"{mean:.3f}" for mean in means))
    entries = {entry["label"]: entry for entry in content["entries"]}
    out.add_row("converged", *(score_text(entries[label]["final"]) for label in runs))
    out.add_row("at equal total compute", *(score_text(entries[label]["equal_compute"]) for label in runs))
    return out


def draw_self_evolution(
    table: Mapping[str, Any], curves: Mapping[str, Curves], swaps: Sequence[int], file: Path
) -> Path:
    """Held-out curves over all stages, the prior as a dashed line, the swaps as dotted ones (Figure 5)."""
    runs, prior = curves["self-evolution"], table["regimes"]["self-evolution"]["reference"]
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
