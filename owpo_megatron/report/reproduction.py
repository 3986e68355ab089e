"""Figures 4 to 6 in the paper's layout, from a reproduction's result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from owpo_megatron.report import style
from owpo_megatron.report.comparison import draw_band, entry_colors
from owpo_megatron.report.published import figure as told
from owpo_megatron.report.reversals import draw_reversals

Result = Mapping[str, Any]
"""See reproduce/execute.py."""
MAIN = "owpo"


def draw(result: Result, file: Path) -> Path:
    """Draw the figure of a result's kind; returns `file`."""
    drawn = {"curves": _curves, "stages": _stages, "bars": _bars, "reversals": draw_reversals}[result["kind"]](result)
    file.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(file, metadata={"Software": None})
    return file


def _curves(result: Result) -> Figure:
    """Figure 4: Pass@1 on the validation set during training, the reference as a dashed line."""
    figure, (axis,) = style.new_figure(1, 1, height=3.8)
    (title,) = result["titles"].values()
    style.dress(axis, f"{title} during training", ylabel="Pass@1", percent=True)
    (height,) = result["reference"].values()
    _dashed(axis, height, "reference: best of DAPO")
    colors = entry_colors(result["rows"], MAIN)
    for label in result["rows"]:
        _curve(axis, result["curves"][label], colors[label], label)
    _finish(axis, result["curves"])
    style.legend(axis, outside=True)
    return figure


def _stages(result: Result) -> Figure:
    """Figure 5: a panel for each method, its stages cut by dotted lines, the prior as a dashed line."""
    figure, axes = style.new_figure(1, len(result["rows"]), height=3.6, width=11.0)
    (title,) = result["titles"].values()
    (prior,) = result["reference"].values()
    heights = [point[1] for seeds in result["curves"].values() for one in seeds.values() for point in one["curve"]]
    for axis, label in zip(axes, result["rows"], strict=True):
        seeds = result["curves"][label]
        last = max(point[0] for one in seeds.values() for point in one["curve"])
        stages = round(last / result["stage_steps"])
        style.dress(axis, f"{shown(label)}: {stages} iterations on {title}", ylabel="Pass@1", percent=True)
        _dashed(axis, prior, "prior")
        _curve(axis, seeds, style.MAIN if label == MAIN else style.WARM, label)
        style.mark_swaps(axis, [result["stage_steps"] * stage for stage in range(1, stages)], name=True)
        _finish(axis, {label: seeds}, top=1.12 * max(heights))
        axis.set_xticks(range(0, last + 1, result["stage_steps"]))
        style.legend(axis, place="lower right")
    return figure


def _bars(result: Result) -> Figure:
    """Figure 6: a group of bars for each set, the reference's score as a dashed line over its group."""
    figure, (axis,) = style.new_figure(1, 1, height=3.6)
    style.dress(axis, "Best checkpoint under a suboptimal reference", xlabel="", ylabel="Pass@1", percent=True)
    values = {tuple(entry[:4]): sum(entry[4]) / len(entry[4]) for entry in result["values"]}
    rows, width = result["rows"], 0.8 / len(result["rows"])
    colors = entry_colors(rows, MAIN)
    for group, cell in enumerate(result["columns"]):
        name = cell[0]
        for index, label in enumerate(rows):
            place = group + (index - (len(rows) - 1) / 2) * width
            height = values[(label, *cell)]
            axis.bar(place, height, 0.92 * width, color=colors[label], label=shown(label) if group == 0 else None)
            axis.annotate(f"{100 * height:.1f}", (place, height), ha="center", va="bottom", fontsize=8)
        text = "reference" if group == 0 else "_nolegend_"
        height = result["reference"][name]
        axis.hlines(height, group - 0.45, group + 0.45, color=style.INK, linestyle="--", label=text, zorder=4)
    axis.set_xticks(range(len(result["columns"])), [result["titles"][cell[0]] for cell in result["columns"]])
    axis.set_ylim(0, 1.15 * max(*values.values(), *result["reference"].values()))
    style.legend(axis, outside=True)
    return figure


def figure_notes(result: Result, model: str) -> list[str]:
    """Return what the paper's text has of a figure, beside one's own, in percent; it does not print the points.

    Args:
        model: the paper's model that was trained.
    """
    name = result["name"]
    values = {tuple(entry[:2]): 100 * sum(entry[4]) / len(entry[4]) for entry in result["values"]}
    if result["kind"] == "curves":
        (ours,) = result["reference"].values()
        return [
            f"the paper's reference has {told(name)['reference']:.2f}, its model is not stated; here {100 * ours:.2f}"
        ]
    if result["kind"] == "stages":
        known = told(name)
        if known["model"] != model:
            return [f"the paper has this figure for {known['model']} alone"]
        (prior,) = result["reference"].values()
        (place,) = result["titles"]
        parts = [
            f"{shown(label)} about {known[label]['percent']:.0f} in {known[label]['iterations']} iterations "
            f"(here {values[label, place]:.2f})"
            for label in result["rows"]
        ]
        return [f"in the paper from {known['prior']:.1f} (here {100 * prior:.2f}): {', '.join(parts)}"]
    if result["kind"] == "bars":
        place, reference = "aime25", 100 * result["reference"]["aime25"]
        parts = [
            f"{shown(label)} {gain:+.1f} (here {values[label, place] - reference:+.2f})"
            for label, gain in told(name)["gain_on_aime25"].items()
        ]
        return [f"gain on AIME25 over the reference, in the paper: {', '.join(parts)}"]
    return []


def shown(label: str) -> str:
    """A method's name as the paper writes it; ablations stay as they are."""
    return {"sym_dapo": "Sym-DAPO"}.get(label, label if label.startswith("w/o") else label.upper())


def _curve(axis: Axes, seeds: Mapping[str, Any], color: str, label: str) -> None:
    curves: Sequence[Any] = [one["curve"] for one in seeds.values()]
    rows = [[score for _, score in points] for points in curves]
    draw_band(axis, [int(step) for step, _ in curves[0]], rows, color, shown(label), label == MAIN, "o")


def _dashed(axis: Axes, height: float, label: str) -> None:
    axis.axhline(height, color=style.MUTED, linewidth=1.0, linestyle="--", label=label)


def _finish(axis: Axes, curves: Mapping[str, Any], top: float | None = None) -> None:
    """End the axis at the last step, so that no tick lies beyond it."""
    last = max(point[0] for seeds in curves.values() for one in seeds.values() for point in one["curve"])
    axis.set_ylim(0, top)
    axis.set_xlim(-0.02 * last, 1.02 * last)
