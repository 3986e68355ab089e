"""Force reversal in training: tokens whose update a symmetric KL turns against the verifier, measured and asked.

Measured is what a method's own gradient did (`reversed_fraction`). Asked is what the quadratic penalty of the paper's
section 4 would have done to the same tokens at the same moment (`turned_by_beta`); OWPO itself never turns one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from owpo_megatron.report import style
from owpo_megatron.report.scores import ScoreTable

Result = Mapping[str, Any]
"""See reproduce/execute.py: `betas`, and by row and seed `reversed` and `turned`, both lists of [step, value]."""
BY_STEP = (0.1, 1.0, 3.0, 10.0)  # coefficients of the left panel
IN_TABLE = (0.001, 0.01, 0.1, 1.0, 10.0)
MAIN, GUIDED = "owpo", "sym_dapo"


def draw_reversals(result: Result) -> Figure:
    """Left OWPO's tokens step by step, right by the strength of the KL, beside the tokens of Sym-DAPO's runs."""
    figure, (left, right) = style.new_figure(1, 2, height=4.0, width=12.0)
    betas: list[float] = result["betas"]
    style.dress(left, "OWPO's tokens that a symmetric KL would have turned", ylabel="share of its tokens", percent=True)
    steps, turned_SB = _turned(result, MAIN)
    for beta, color in zip(BY_STEP, (style.CALM, style.SECOND, style.WARM, style.ALERT), strict=True):
        left.plot(steps, turned_SB[:, betas.index(beta)], color=color, linewidth=1.4, label=f"with KL, β = {beta:g}")
    measured = _measured(result, MAIN)
    left.plot(*zip(*measured, strict=True), color=style.MAIN, linewidth=2.2, label="OWPO itself (measured)")
    left.set_ylim(bottom=-0.002)

    style.dress(
        right, "By the strength of the KL, mean over the steps", xlabel="coefficient β of the symmetric KL",
        ylabel="share of the run's tokens", percent=True,
    )  # fmt: skip
    right.set_xscale("log")
    right.plot(betas, turned_SB.mean(0), color=style.MAIN, linewidth=2.2, label="OWPO's tokens")
    shades = (style.WARM, style.ALERT, style.PLUM, style.SECOND)
    runs = [label for label in result["rows"] if label.startswith(GUIDED)]
    for label, color in zip(runs, shades, strict=False):
        _, asked_SB = _turned(result, label)
        name = label.replace(GUIDED, "Sym-DAPO").replace("beta", "β =")
        right.plot(betas, asked_SB.mean(0), color=color, linewidth=1.4, linestyle="--", label=f"tokens of {name}")
        _dot(right, _beta_of(label), _mean(_measured(result, label)), color)
    right.plot([], [], "o", color=style.MUTED, markersize=6, label="measured in that run")
    right.set_ylim(bottom=-0.002)
    for axis in (left, right):
        _legend_below(axis)
    return figure


def reversal_table(result: Result) -> ScoreTable:
    """Mean shares over the steps, in percent: measured, and asked for some coefficients."""
    betas: list[float] = result["betas"]
    cells: list[list[float | None]] = []
    for label in result["rows"]:
        row: list[float | None] = [100 * _mean(_measured(result, label)) if _measured(result, label) else None]
        _, asked_SB = _turned(result, label)
        row += [100 * float(asked_SB[:, betas.index(beta)].mean()) if len(asked_SB) else None for beta in IN_TABLE]
        cells.append(row)
    columns = [("turned", "measured"), *(("would be by KL, β", f"{beta:g}") for beta in IN_TABLE)]
    return ScoreTable(result["title"], columns, [(result["model"], label) for label in result["rows"]], cells)


def _turned(result: Result, label: str) -> tuple[list[int], np.ndarray]:
    """Steps, and shares [S, B] as means over the seeds; [0, B] for a method that was not asked."""
    seeds = list(result["curves"][label].values())
    rows = [dict(map(tuple, one["turned"])) for one in seeds]
    steps = sorted(set.intersection(*(set(row) for row in rows)))
    return steps, np.asarray([[row[step] for row in rows] for step in steps], float).reshape(
        len(steps), len(rows), len(result["betas"])
    ).mean(1)


def _measured(result: Result, label: str) -> list[tuple[int, float]]:
    rows = [dict(map(tuple, one["reversed"])) for one in result["curves"][label].values()]
    steps = sorted(set.intersection(*(set(row) for row in rows)))
    return [(step, sum(row[step] for row in rows) / len(rows)) for step in steps]


def _mean(points: Sequence[tuple[int, float]]) -> float:
    return sum(value for _, value in points) / len(points)


def _beta_of(label: str) -> float:
    """The coefficient in a row's label, e.g. 0.01 in "sym_dapo, beta 0.01"."""
    return float(label.rpartition("beta ")[2])


def _dot(axis: Axes, beta: float, share: float, color: str) -> None:
    axis.plot([beta], [share], "o", color=color, markersize=6, zorder=4)


def _legend_below(axis: Axes) -> None:
    axis.legend(
        frameon=False, fontsize=8, labelcolor=style.INK, ncols=2, handlelength=1.8, loc="upper left",
        bbox_to_anchor=(0.0, -0.16),
    )  # fmt: skip
