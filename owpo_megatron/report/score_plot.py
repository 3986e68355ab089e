"""Scores as a figure: a panel per set, a dot with its interval for every checkpoint of every method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from owpo_megatron.report import style
from owpo_megatron.report.scores import Scored, metric_title

COLORS = {"best": style.MAIN, "converged": style.WARM}


def write_score_figure(file: Path, scored: Sequence[Scored]) -> Path:
    """Draw the first metric of every set; returns `file`."""
    titles = {name: str(scores["title"]) for one in scored for name, scores in one.sets.items()}
    several_models = len({one.model for one in scored}) > 1
    labels = [f"{one.model} {one.method}".strip() if several_models else one.method or one.model for one in scored]
    rows = list(dict.fromkeys(labels))
    figure, axes = style.new_figure(1, len(titles), height=1.4 + 0.45 * len(rows), width=2.0 + 3.2 * len(titles))
    places = list(dict.fromkeys(one.checkpoint for one in scored))
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        metric = next(iter(next(one.sets[name]["metrics"] for one in scored if name in one.sets)))
        style.dress(axis, f"{title}, {metric_title(metric)}", xlabel="percent, 95 % interval over problems")
        axis.grid(True, axis="x", color=style.HAIR, linewidth=0.7)
        axis.grid(False, axis="y")
        for place in places:
            mine = [index for index, one in enumerate(scored) if one.checkpoint == place and name in one.sets]
            values = [scored[index].sets[name]["metrics"][metric] for index in mine]
            shift = 0.16 * (places.index(place) - (len(places) - 1) / 2)
            axis.errorbar(
                [100 * value["value"] for value in values],
                [rows.index(labels[index]) + shift for index in mine],
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
        highest = max(one.sets[name]["metrics"][metric]["high"] for one in scored if name in one.sets)
        axis.set_xlim(0, max(1.0, 105 * highest))
        axis.locator_params(axis="x", steps=[1, 2, 5, 10])
    if any(places):
        style.legend(axes[-1], outside=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Software": None})
    return file
