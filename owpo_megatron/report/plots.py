"""The figures of a run, each a function of its columns; a missing column leaves its panel empty, with a note."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from owpo_megatron.report import style
from owpo_megatron.run.metrics_reader import RunMetrics, Series, smoothed

DELTA_RANGE = 0.5  # delta_hist spans [-0.5, 0.5] in equal bins, open at both ends
HELD_OUT = "Held-out problems"
_SEQUENTIAL = LinearSegmentedColormap.from_list("ink", ["#ffffff", "#cfe1ee", "#6fa3c8", "#1f5f8b", "#0b2f4d"])


def write_figures(run: RunMetrics, folder: Path) -> list[Path]:
    """Draw every figure of a run into `folder`, one PNG each; returns them in the order of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in FIGURES.items():
        file = folder / f"{name}.png"
        figure = draw(run)
        _fit_steps(figure, run)
        figure.savefig(file, metadata={"Software": None})
        written.append(file)
    return written


def learning(run: RunMetrics) -> Figure:
    """Training reward (raw and smoothed) and the scores on held-out problems, with swap marks."""
    figure, (reward_axis, eval_axis) = style.new_figure(1, 2, height=3.4)
    reward = run.column("reward_mean")
    style.dress(reward_axis, "Reward of the rollouts", percent=True)
    if reward:
        _line(reward_axis, reward, style.CALM, width=1.0)
        smooth = Series(reward.steps, smoothed(reward.values))
        _line(reward_axis, smooth, style.MAIN, width=2.0, label="moving average")
        reward_axis.set_ylim(0, min(1.02, max(reward.values) * 1.15 + 0.02))
        style.mark_swaps(reward_axis, run.swaps(), name=True)
    else:
        style.say_missing(reward_axis, "no reward was logged")
    style.dress(eval_axis, HELD_OUT, percent=True)
    scores = run.eval_fields()
    for name, color in zip(scores, (style.MAIN, style.WARM, style.SECOND, style.PLUM), strict=False):
        series = run.eval_column(name)
        _line(eval_axis, series, color, width=1.8, label=name, marker="o")
        for step, (low, high) in run.eval_intervals(name).items():
            eval_axis.plot([step, step], [low, high], color=color, linewidth=1.0, alpha=0.55, zorder=1)
        for index, side in {0: "left", len(series.steps) - 1: "right"}.items():
            at = (series.steps[index], series.values[index])
            label = f"{series.values[index]:.0%}"
            # A curve that rises from its first point would run through a label above it.
            place = (7, -8) if index == 0 and series.values[index] < series.values[-1] else (0, 6)
            eval_axis.annotate(
                label, at, xytext=place, textcoords="offset points", ha=side, fontsize=8, color=color
            )  # fmt: skip
    if scores:
        eval_axis.set_ylim(0, min(1.08, max(max(run.eval_column(name).values) for name in scores) * 1.25 + 0.02))
        style.mark_swaps(eval_axis, run.swaps())
        style.legend(eval_axis)
    else:
        style.say_missing(eval_axis, "no evaluation was logged")
    return figure


def reweighting(run: RunMetrics) -> Figure:
    """OWPO's reweighting: active samples, the weight w and its bounds, and the four cases of the paper's Table 1."""
    figure, (active_axis, case_axis, weight_axis, bound_axis) = style.new_figure(2, 2, height=2.7, width=11.0)
    active = run.column("n_active")
    style.dress(active_axis, "Active samples of a group")
    if active:
        active_axis.step(active.steps, active.values, where="mid", color=style.MAIN, linewidth=1.8, marker=_dot(active))
        active_axis.set_ylim(0, max(active.values) * 1.12)
        style.mark_swaps(active_axis, run.swaps(), name=True)
    else:
        style.say_missing(active_axis, "no curriculum was logged")

    style.dress(case_axis, "Tokens against the reference", percent=True)
    cases = {name: run.column(name) for name in style.CASES}
    if any(cases.values()):
        labels = {name: text for name, (text, _) in style.CASES.items()}
        _stack(case_axis, cases, labels, [color for _, color in style.CASES.values()])
        case_axis.set_ylim(0, 1)
        style.mark_swaps(case_axis, run.swaps())
        style.legend(case_axis, outside=True)
    else:
        style.say_missing(case_axis, "no reference tokens were logged")

    style.dress(weight_axis, "Weight w, mean over tokens")
    weight = run.column("w_mean")
    if weight:
        weight_axis.axhline(1.0, color=style.MUTED, linewidth=0.8)
        _line(weight_axis, weight, style.MAIN, width=1.8)
        weight_axis.ticklabel_format(axis="y", useOffset=False)
        style.widen(weight_axis, [*weight.values, 1.0])
        style.mark_swaps(weight_axis, run.swaps())
    else:
        style.say_missing(weight_axis, "this method has no weights")

    style.dress(bound_axis, "Active tokens with w at a bound", percent=True)
    bounds = {"w_at_low": ("lower: gain locked", style.MAIN), "w_at_high": ("upper: accelerated", style.WARM)}
    for name, (text, color) in bounds.items():
        _line(bound_axis, run.column(name), color, width=1.6, label=text)
    if any(run.column(name) for name in bounds):
        bound_axis.set_ylim(bottom=0)
        style.mark_swaps(bound_axis, run.swaps())
        style.legend(bound_axis, outside=True)
    else:
        style.say_missing(bound_axis, "this method has no weights")
    return figure


def deviation(run: RunMetrics) -> Figure:
    """Heat map of delta over the run; between the lines lies the window in which w is not cut off."""
    figure, (axis,) = style.new_figure(1, 1, height=3.4)
    style.dress(axis, "Deviation from the reference in the verifier's direction", ylabel="delta")
    axis.grid(False)
    hist = run.column("delta_hist")
    rows = [(step, np.asarray(counts, dtype=float)) for step, counts in hist if sum(counts)]
    if not rows:
        style.say_missing(axis, "no deviation was logged (the reference equals the policy, or there is none)")
        return figure
    bins = len(rows[0][1])
    first, last = rows[0][0], rows[-1][0]
    share_BS = np.full((bins, last - first + 1), np.nan)
    for step, counts in rows:
        share_BS[:, step - first] = counts / counts.sum()
    # Most tokens lie within a hair of 0: the square root keeps the tails visible.
    image = axis.imshow(
        np.sqrt(share_BS),
        origin="lower",
        aspect="auto",
        cmap=_SEQUENTIAL,
        extent=(first - 0.5, last + 0.5, -DELTA_RANGE, DELTA_RANGE),
        interpolation="nearest",
        vmin=0,
        vmax=1,
    )
    for weight in (run.setting("algorithm.weight_low", 0.8), run.setting("algorithm.weight_high", 1.2)):
        bound, text = -math.log(weight), f"w = {weight:g}"
        axis.axhline(bound, color=style.WARM, linewidth=1.0, linestyle="--")
        axis.annotate(
            text, (1.0, bound), xycoords=("axes fraction", "data"), xytext=(-4, 3), textcoords="offset points",
            ha="right", fontsize=8, color=style.WARM,
        )  # fmt: skip
    style.mark_swaps(axis, run.swaps(), name=True)
    bar = figure.colorbar(image, ax=axis, pad=0.01, ticks=[0, 0.1**0.5, 0.25**0.5, 0.5**0.5, 1])
    bar.ax.set_yticklabels(["0 %", "10 %", "25 %", "50 %", "100 %"])
    bar.ax.tick_params(labelsize=8, colors=style.MUTED, length=0)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("share of the step's tokens", fontsize=8.5, color=style.MUTED)
    return figure


def health(run: RunMetrics) -> Figure:
    """Loss, gradient norm, entropy, KL to the reference, clipping, trainer against engine."""
    figure, axes = style.new_figure(2, 3, height=2.5, width=12.5)
    panels = [
        ("loss", "Loss", "plain"),
        ("grad_norm", "Gradient norm before clipping", "zero"),
        ("entropy", "Entropy per token (nats)", "zero"),
        ("kl_ref", "KL to the reference (nats per token)", "plain"),
        ("clip_fraction", "Clipped tokens", "percent"),
        ("mismatch", "Trainer against engine, mean |dlogp|", "log"),
    ]
    for axis, (field, title, scale) in zip(axes, panels, strict=True):
        series = run.column(field)
        style.dress(axis, title, percent=scale == "percent")
        if not series:
            style.say_missing(axis, "not logged")
            continue
        _line(axis, series, style.MAIN, width=1.4)
        if scale == "log" and min(series.values) > 0 and max(series.values) > 20 * min(series.values):
            axis.set_yscale("log")
        elif scale != "percent":
            axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useOffset=False)
            axis.yaxis.get_offset_text().set(fontsize=8, color=style.MUTED)
        if scale in ("zero", "percent"):
            axis.set_ylim(0, max(max(series.values) * 1.12, 1e-12))
        elif scale == "plain":
            style.widen(axis, series.values)
        style.mark_swaps(axis, run.swaps())
    return figure


def responses(run: RunMetrics) -> Figure:
    """Length and truncation of responses, and their verdicts."""
    figure, (length_axis, verdict_axis) = style.new_figure(1, 2, height=3.0)
    style.dress(length_axis, "Response length", ylabel="tokens")
    length, truncated = run.column("response_length"), run.column("truncated_share")
    if length:
        _line(length_axis, length, style.MAIN, width=1.8, label="mean length")
        length_axis.set_ylim(0, max(length.values) * 1.4)
        if truncated:
            twin = length_axis.twinx()
            style.dress(twin, "", percent=True)
            twin.grid(False)
            _line(twin, truncated, style.WARM, width=1.2, label="cut off (right axis)")
            twin.set_ylim(0, max(0.1, max(truncated.values) * 1.4))
            handles = [*length_axis.get_legend_handles_labels()[0], *twin.get_legend_handles_labels()[0]]
            twin.legend(handles=handles, frameon=False, fontsize=8, labelcolor=style.INK, loc="upper left")
    else:
        style.say_missing(length_axis, "not logged")
    style.dress(verdict_axis, "Verdicts", percent=True)
    reasons = run.fields_under("verifier")
    if reasons:
        ordered = sorted(reasons, key=lambda name: (name != "ok", name != "wrong", name))
        counts = {name: run.column(f"verifier.{name}") for name in ordered}
        colors = [style.SECOND if name == "ok" else style.HAIR if name == "wrong" else "" for name in ordered]
        spare = iter([style.WARM, style.ALERT, style.PLUM, style.CALM, style.MAIN])
        _stack(verdict_axis, counts, {}, [color or next(spare) for color in colors], share=True)
        verdict_axis.set_ylim(0, 1)
        style.legend(verdict_axis, outside=True)
    else:
        style.say_missing(verdict_axis, "not logged")
    return figure


def seconds(run: RunMetrics) -> Figure:
    """Time of each step by phase."""
    figure, (axis,) = style.new_figure(1, 1, height=3.2)
    style.dress(axis, "Seconds per step", ylabel="seconds")
    phases = [name for name in run.fields_under("seconds") if name != "total"]
    if not phases:
        style.say_missing(axis, "not logged")
        return figure
    steps = [int(line["step"]) for line in run.steps]
    floor = np.zeros(len(steps))
    known = dict(zip(PHASES, style.CYCLE, strict=False))
    for name in sorted(phases, key=lambda name: PHASES.index(name) if name in PHASES else len(PHASES)):
        value = dict(run.column(f"seconds.{name}"))
        height = np.array([value.get(step, 0.0) for step in steps])
        axis.bar(steps, height, bottom=floor, width=0.9, color=known.get(name, style.MUTED), label=name, linewidth=0)
        floor += height
    total = run.column("seconds.total")
    if total:
        _line(axis, total, style.INK, width=0.9, label="total")
    style.legend(axis, outside=True)
    return figure


PHASES = ("rollout", "update", "verify", "logp_ref", "logp_old", "sync", "checkpoint", "swap", "eval")
FIGURES: dict[str, Callable[[RunMetrics], Figure]] = {
    "learning": learning,
    "reweighting": reweighting,
    "deviation": deviation,
    "health": health,
    "responses": responses,
    "seconds": seconds,
}


def _fit_steps(figure: Figure, run: RunMetrics) -> None:
    """The same steps on every panel, whole even when there is one only; step 0 only where evaluations are shown."""
    trained = [int(line["step"]) for line in run.steps]
    evaluated = [int(line["step"]) for line in run.evals]
    for axis in figure.axes:
        if axis.get_xlabel() == "step":
            shows_evaluations = axis.get_title(loc="left") == HELD_OUT
            steps = (trained + evaluated if shows_evaluations else trained) or evaluated or [0]
            axis.set_xlim(min(steps) - 0.6, max(steps) + 0.6)


def _line(
    axis: Axes, series: Series, color: str, width: float, label: str | None = None, marker: str | None = None
) -> None:
    dot = marker or _dot(series)
    axis.plot(series.steps, series.values, color=color, linewidth=width, label=label, marker=dot, markersize=4)


def _dot(series: Series) -> str | None:
    return "o" if len(series.steps) < 4 else None  # a line needs two points


def _stack(
    axis: Axes, columns: dict[str, Series], labels: dict[str, str], colors: list[str], share: bool = False
) -> None:
    """Bars on top of each other, one per step, without gaps but where a step has no value; `share` scales each to 1."""
    steps = sorted({step for series in columns.values() for step in series.steps})
    rows = [[dict(series).get(step, 0.0) for step in steps] for series in columns.values()]
    value_RS = np.array(rows, dtype=float)
    if share:
        value_RS = value_RS / np.maximum(value_RS.sum(axis=0), 1e-12)
    floor = np.zeros(len(steps))
    for name, value_S, color in zip(columns, value_RS, colors, strict=True):
        axis.bar(steps, value_S, bottom=floor, width=1.0, color=color, label=labels.get(name, name), linewidth=0)
        floor += value_S
