"""The look that all figures share: one palette, quiet axes, titles on the left, swap marks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, MUTED, HAIR = "#1f2933", "#7b8794", "#e4e7eb"
MAIN, SECOND, WARM, ALERT, CALM, PLUM = "#1f5f8b", "#5aa9a3", "#d98e32", "#b5493a", "#8fb8d6", "#7a5c99"
CYCLE = (MAIN, WARM, SECOND, ALERT, PLUM, CALM, "#a3a847", "#566573", "#c27ba0")  # as many as there are methods

# Paper, Table 1. Blue: ahead of the reference (gains are locked); warm: behind it (correction is accelerated).
CASES = {
    "case_1": ("I: right, ahead", MAIN),
    "case_4": ("IV: wrong, ahead", CALM),
    "case_2": ("II: right, behind", WARM),
    "case_3": ("III: wrong, behind", ALERT),
}


def new_figure(rows: int = 1, columns: int = 1, height: float = 3.2, width: float = 9.0) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, and its axes in reading order; `height` is of one row, in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.02, hspace=0.04)
    figure = Figure(figsize=(width, height * rows), dpi=130, layout=layout, facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [axis for row in axes for axis in row]


def dress(axis: Axes, title: str, xlabel: str = "step", ylabel: str = "", percent: bool = False) -> None:
    """Title on the left, no box, a hairline grid; steps are whole numbers."""
    axis.set_title(title, loc="left", fontsize=10.5, color=INK, fontweight="bold", pad=10)
    axis.set_xlabel(xlabel, fontsize=8.5, color=MUTED)
    if ylabel:
        axis.set_ylabel(ylabel, fontsize=8.5, color=MUTED)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color("#cbd2d9")
    axis.tick_params(colors=MUTED, labelsize=8, length=3, width=0.6)
    axis.grid(True, axis="y", color=HAIR, linewidth=0.7)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    if percent:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))


def widen(axis: Axes, values: Sequence[float], share: float = 0.02) -> None:
    """Limits that span at least this share of the values' size, so that rounding noise does not look like a drift."""
    low, high = min(values), max(values)
    least = share * max(abs(low), abs(high), 1e-12)
    spare = max(0.08 * (high - low), (least - (high - low)) / 2)
    axis.set_ylim(low - spare, high + spare)


def mark_swaps(axis: Axes, swaps: Iterable[int], name: bool = False) -> None:
    """A dotted line at each swap of the reference; `name` writes "swap" once, above the first."""
    for index, step in enumerate(swaps):
        axis.axvline(step + 0.5, color=PLUM, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1.5)
        if name and index == 0:
            axis.annotate(
                "swap",
                (step + 0.5, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(3, -2),
                textcoords="offset points",
                fontsize=7.5,
                color=PLUM,
                va="top",
            )


def legend(axis: Axes, columns: int = 1, outside: bool = False, place: str = "best", handlelength: float = 1.4) -> None:
    """A legend on white at a place in the panel; `outside` puts it to the right of the panel."""
    where: dict[str, Any] = {"loc": place}
    if outside:
        where = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
    where |= {"facecolor": "white", "edgecolor": "none", "framealpha": 0.9}
    axis.legend(fontsize=8, labelcolor=INK, ncols=columns, handlelength=handlelength, **where)


def say_missing(axis: Axes, what: str) -> None:
    """An empty panel with the reason why."""
    axis.text(0.5, 0.5, what, transform=axis.transAxes, ha="center", va="center", fontsize=9, color=MUTED)
    axis.set_yticks([])
    axis.grid(False)
