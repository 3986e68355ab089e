"""A comparison of methods, from the table.json and curves.json of experiments/compare.py: tables and figures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich.table import Table

from owpo_megatron.report import style

SCORES = {"final": "final", "auc": "AUC", "equal_compute": "equal compute"}
"""Field of table.json -> heading."""
TRAINING = {
    "reward_mean": "Reward of the rollouts",
    "entropy": "Entropy per token (nats)",
    "grad_norm": "Gradient norm before clipping",
    "response_length": "Response length (tokens)",
}
Curves = Mapping[str, Mapping[str, Any]]
"""Curves of one regime: entry -> seed -> {"curve": [[step, score], ...], "training": {column: values}}."""

# More methods than these have their legend beside the panel, and no bands but the main one's.
MANY = 7


def regime_table(table: Mapping[str, Any], regime: str) -> Table:
    """One line an entry: its scores, and by how much the main entry is ahead of it, paired by seed."""
    out = Table(title=_title(table, regime), title_justify="left", box=None, header_style="bold", padding=(0, 2, 0, 0))
    heads, rows = _lines(table, regime)
    for index, head in enumerate(heads):
        out.add_column(head, justify="right" if index else "left", no_wrap=index == 0)
    for row in rows:
        out.add_row(*row)
    return out


def write_markdown(table: Mapping[str, Any], file: Path) -> None:
    """The same lines for a document, regime by regime."""
    parts = []
    for regime in table["regimes"]:
        heads, rows = _lines(table, regime)
        lines = [heads, ["---"] * len(heads), *rows]
        parts.append("\n".join(["| " + " | ".join(line) + " |" for line in lines]))
        parts[-1] = f"{_title(table, regime).replace('[bold]', '**').replace('[/bold]', '**')}\n\n{parts[-1]}\n"
    file.write_text("\n".join(parts))


def _lines(table: Mapping[str, Any], regime: str) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: means with half the width of their 95 % interval, differences with the interval."""
    main = table["against"]
    shown = [field for field in SCORES if field != "equal_compute" or table.get("equal_compute", True)]
    compared = [field for field in shown if field != "final"]
    heads = ["method", *(SCORES[field] for field in shown)]
    heads += [*(f"{main} ahead: {SCORES[field]}" for field in compared), "token passes"]
    rows = []
    for entry in table["regimes"][regime]["entries"]:
        minus, passes = entry.get("minus", {}), entry["total_token_passes"]
        rows.append(
            [
                entry["label"],
                *(score_text(entry[field]) for field in shown),
                *(_difference(minus.get(field)) for field in compared),
                f"{passes['mean'] / 1e3:,.0f} k" if passes else "-",
            ]
        )
    return heads, rows


def write_comparison_figures(table: Mapping[str, Any], curves: Mapping[str, Curves], folder: Path) -> list[Path]:
    """Two PNGs a regime: scores on held-out problems (as the paper's Figures 4 and 6), and how training went."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for regime, content in curves.items():
        if content:
            written.append(_scores(table, regime, content, folder / f"{regime}_scores.png"))
            written.append(_training(table, regime, content, folder / f"{regime}_training.png"))
    return written


def _scores(table: Mapping[str, Any], regime: str, curves: Curves, file: Path) -> Path:
    """Left the methods, right the main entry with its ablations; bands span the seeds."""
    main = table["against"]
    colors, lines = entry_colors(list(curves), main), entry_lines(list(curves), main)
    ablations = [label for label in curves if label.startswith(f"{main}_")]
    methods = [label for label in curves if label not in ablations]
    panels = [("Methods", methods)] + ([("Ablations", [main, *ablations])] if ablations else [])
    figure, axes = style.new_figure(1, len(panels), height=3.6, width=5.6 * len(panels))
    reference = reference_used(table, regime)
    for axis, (title, labels) in zip(axes, panels, strict=True):
        style.dress(axis, f"{title}: {table['metric']} on held-out problems ({regime})", percent=True)
        if reference:
            axis.axhline(reference["mean"], color=style.MUTED, linewidth=1.0, linestyle="--", label="reference")
        many = len(labels) > MANY
        for label in labels:
            rows = [dict(map(tuple, one["curve"])) for one in curves[label].values()]
            steps = sorted(set.intersection(*(set(row) for row in rows)))
            values, is_main = [[row[step] for step in steps] for row in rows], label == main
            draw_band(axis, steps, values, colors[label], label, is_main, "o", lines[label], band=is_main or not many)
        axis.set_ylim(bottom=0)
        style.legend(axis, outside=many, handlelength=3.0 if many else 1.4)  # dashes have to show
    figure.savefig(file, metadata={"Software": None})
    return file


def _training(table: Mapping[str, Any], regime: str, curves: Curves, file: Path) -> Path:
    figure, axes = style.new_figure(2, 2, height=2.7, width=11.0)
    for axis, (column, title) in zip(axes, TRAINING.items(), strict=True):
        style.dress(axis, f"{title} ({regime})", percent=column == "reward_mean")
        lines = entry_lines(list(curves), table["against"])
        for label, color in entry_colors(list(curves), table["against"]).items():
            rows = [one["training"][column] for one in curves[label].values() if column in one["training"]]
            if rows:
                length = min(map(len, rows))
                is_main = label == table["against"]
                values, band = [row[:length] for row in rows], is_main or len(lines) <= MANY
                draw_band(axis, range(1, length + 1), values, color, label, is_main, None, lines[label], band=band)
        axis.set_ylim(bottom=0)
    style.legend(axes[1], outside=True)
    figure.savefig(file, metadata={"Software": None})
    return file


def draw_band(
    axis: Axes,
    steps: Sequence[int],
    rows: Sequence[Sequence[float]],
    color: str,
    label: str,
    strong: bool,
    marker: str | None = None,
    line: str = "-",
    *,
    band: bool = True,
) -> None:
    """The mean over seeds, in a band from the lowest to the highest seed."""
    value_SN = np.asarray(rows, dtype=float)
    if band:
        axis.fill_between(steps, value_SN.min(0), value_SN.max(0), color=color, alpha=0.12, linewidth=0)
    axis.plot(
        steps, value_SN.mean(0), color=color, linewidth=2.2 if strong else 1.4, label=label, marker=marker,
        markersize=3, zorder=3 if strong else 2, linestyle=line,
    )  # fmt: skip


def entry_colors(labels: Sequence[str], main: str) -> dict[str, str]:
    """An entry has one colour on every panel, the main entry the main one."""
    others = itertools.cycle(style.CYCLE[1:])
    return {label: style.MAIN if label == main else next(others) for label in labels}


def entry_lines(labels: Sequence[str], main: str) -> dict[str, str]:
    """Solid lines; dashed where a colour comes again, and dotted the third time."""
    others = [label for label in labels if label != main]
    rounds = {label: index // len(style.CYCLE[1:]) for index, label in enumerate(others)}
    return {label: ("-", "--", ":")[min(rounds.get(label, 0), 2)] for label in labels}


def _title(table: Mapping[str, Any], regime: str) -> str:
    content = table["regimes"][regime]
    facts = [f"{table['metric']}, {table['steps']} steps, {len(table['seeds'])} seeds"]
    if content["base"] is not None:
        facts.append(f"base {content['base']:.3f}")
    if used := reference_used(table, regime):
        wanted = table["reference"]
        which = f"{'first good enough' if wanted.get('at_score') else 'best'} of {wanted['steps']}"
        which = which if wanted.get("at_score") or wanted.get("weights") == "best" else wanted["steps"]
        facts.append(f"reference {score_text(used)} ({wanted['method']}, {which} steps)")
    return f"[bold]{regime}[/bold]: " + "; ".join(facts)


def reference_used(table: Mapping[str, Any], regime: str) -> Mapping[str, Any] | None:
    """Score of the weights that the methods had as their reference: the last, the best, or the first good enough."""
    content: Mapping[str, Any] = table["regimes"][regime]
    return content["reference_used"]  # type: ignore[no-any-return]


def score_text(spread: Mapping[str, Any] | None) -> str:
    """Mean and half the width of its 95 % interval."""
    if spread is None:
        return "-"
    half = "" if spread["low"] is None else f" ± {(spread['high'] - spread['low']) / 2:.3f}"
    return f"{spread['mean']:.3f}{half}"


def _difference(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "-"
    if estimate["low"] is None:
        return f"{estimate['mean']:+.3f}"
    return f"{estimate['mean']:+.3f} [{estimate['low']:+.3f}, {estimate['high']:+.3f}]"
