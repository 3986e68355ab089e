"""Scores as a figure: a panel a set, a dot with its interval for every checkpoint of every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from owpo_megatron.report import style
from owpo_megatron.report.scores import Scored

COLORS = {"best": style.MAIN, "converged": style.WARM}


def write_score_figure(file: Path, scored: Sequence[Scored]) -> Path:
    """Draw the first metric of every set; returns `file`."""
    titles = {name: str(scores["title"]) for one in scored for name, scores in one.sets.items()}
    rows = list(dict.fromkeys(f"{one.method or one.model}" for one in scored))
    figure, axes = style.new_figure(1, len(titles), height=1.4 + 0.45 * len(rows), width=2.0 + 3.2 * len(titles))
    places = list(dict.fromkeys(one.checkpoint for one in scored))
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        metric = next(iter(next(one.sets[name]["metrics"] for one in scored if name in one.sets)))
        style.dress(axis, f"{title}, {metric.replace('pass@', 'Pass@')}", xlabel="percent, 95 % interval over problems")
        axis.grid(True, axis="x", color=style.HAIR, linewidth=0.7)
        axis.grid(False, axis="y")
        for place in places:
            mine = [one for one in scored if one.checkpoint == place and name in one.sets]
            values = [one.sets[name]["metrics"][metric] for one in mine]
            shift = 0.16 * (places.index(place) - (len(places) - 1) / 2)
            axis.errorbar(
                [100 * value["value"] for value in values],
                [rows.index(one.method or one.model) + shift for one in mine],
                xerr=[
                    [100 * (value["value"] - value["low"]) for value in values],
                    [100 * (value["high"] - value["value"]) for value in values],
                ],
                fmt="o",
                markersize=4,
                linewidth=1.2,
                color=COLORS.get(place, style.SECOND if place else style.MAIN),
                label=place or None,
            )
        axis.set_yticks(range(len(rows)), rows)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.set_xlim(left=0)
    if any(places):
        style.legend(axes[-1], outside=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Software": None})
    return file
