"""The figure of `owpo bench head`: time and memory of each implementation, a panel pair a shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from owpo_megatron.report import style
from owpo_megatron.run.files import whole_file

Row = Mapping[str, Any]


def write_head_plot(rows: Sequence[Row], file: Path) -> None:
    """Draw the benchmark's rows as PNG; rows that failed are left out, the JSON has their reasons.

    Args:
        rows: from a CPU {impl, density, seconds, extra_peak_bytes} or of a GPU {impl, work, tokens, hidden, vocab,
            density, ms, extra_peak_bytes}.
    """
    done = [row for row in rows if "error" not in row]
    shapes = list(dict.fromkeys(_shape(row) for row in done))
    most = max((sum(_shape(row) == shape for row in done) for shape in shapes), default=1)
    figure, axes = style.new_figure(max(len(shapes), 1), 2, height=1.2 + 0.24 * most, width=11.0)
    for index, shape in enumerate(shapes):
        mine = [row for row in done if _shape(row) == shape]
        time_axis, memory_axis = axes[2 * index], axes[2 * index + 1]
        title = f" at {shape}" if shape else ""
        _bars(time_axis, mine, [_milliseconds(row) for row in mine], f"Time{title}", "ms")
        megabytes = [(row.get("extra_peak_bytes") or 0) / 1e6 for row in mine]
        _bars(memory_axis, mine, megabytes, "Extra memory at the peak", "MB")
        memory_axis.set_yticklabels([])
    with whole_file(file) as scratch:
        figure.savefig(scratch, format="png", metadata={"Software": None})


def _bars(axis: Axes, rows: Sequence[Row], values: Sequence[float], title: str, unit: str) -> None:
    style.dress(axis, title)
    colors = [style.MAIN if row["impl"].startswith("ours") else style.CALM for row in rows]
    bars = axis.barh(range(len(rows)), values, color=colors, height=0.7)
    axis.bar_label(bars, [f"{value:,.4g}" for value in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axis.set_xlim(0, 1.15 * max(values, default=1.0))
    axis.set_xlabel(unit)
    axis.invert_yaxis()


def _shape(row: Row) -> str:
    return f"T={row['tokens']:,} H={row['hidden']:,} V={row['vocab']:,}" if "tokens" in row else ""


def _milliseconds(row: Row) -> float:
    return row["ms"] if "ms" in row else 1e3 * row["seconds"]


def _label(row: Row) -> str:
    work = f", {row['work']}" if "work" in row else ""
    return f"{row['impl']}{work}, {row['density']:.0%} of rows"
