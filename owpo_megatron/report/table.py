"""A run, or several side by side, as rows of (what, value) and as a terminal table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from owpo_megatron.run.metrics_reader import RunMetrics, last_mean


def rows(run: RunMetrics) -> dict[str, str]:
    """The facts of a run worth a line each; what was not logged is left out.

    Example:
        {"algorithm": "owpo", "steps": "40", "pass@1": "18.0 % -> 78.0 %", "swaps": "3 (after steps 12, 24, 36)", ...}
    """
    facts: dict[str, str] = {}
    if run.setting("algorithm.name"):
        facts["algorithm"] = str(run.setting("algorithm.name"))
    steps, planned = len(run.steps), run.setting("optimizer.steps")
    facts["steps"] = f"{steps} of {planned}" if planned and planned != steps else str(steps)
    for name in run.eval_fields():
        values = run.eval_column(name).values
        series, intervals = run.eval_column(name), run.eval_intervals(name)
        ends = [0] if len(values) == 1 else [0, -1]
        facts[name] = " -> ".join(_percent(values[end]) + _interval(intervals.get(series.steps[end])) for end in ends)
    reward = run.column("reward_mean")
    if reward:
        facts["reward"] = (
            f"{_percent(reward.values[0])} -> {_percent(last_mean(reward) or 0.0)} (last {min(10, steps)} steps)"
        )
    swaps = run.swaps()
    if run.column("ref_id") or swaps:
        shown = ", ".join(str(step) for step in swaps[:6]) + (", ..." if len(swaps) > 6 else "")
        facts["swaps"] = f"{len(swaps)} (after steps {shown})" if swaps else "0"
    for field, label, text in (
        ("entropy", "entropy", "{:.3f} nats"),
        ("kl_ref", "KL to the reference", "{:.4f} nats"),
        ("clip_fraction", "clipped tokens", "{:.2f} %"),
        ("grad_norm", "gradient norm", "{:.3f}"),
        ("mismatch", "trainer against engine", "{:.1e} mean |dlogp|"),
        ("response_length", "response length", "{:.1f} tokens"),
        ("seconds.total", "seconds per step", "{:.2f}"),
    ):
        mean = last_mean(run.column(field))
        if mean is not None:
            facts[label] = text.format(100 * mean if text.endswith("%") else mean)
    return facts | _from_summary(run)


def summary_table(runs: Sequence[RunMetrics]) -> Table:
    """A table with one column per run."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    for run in runs:
        table.add_column(run.name)
    facts = [rows(run) for run in runs]
    labels = list(dict.fromkeys(label for column in facts for label in column))
    for label in labels:
        table.add_row(f"[dim]{label}[/dim]", *(column.get(label, "-") for column in facts))
    return table


def _from_summary(run: RunMetrics) -> dict[str, str]:
    facts: dict[str, str] = {}
    parallel, engine = run.summary.get("parallel"), run.summary.get("engine")
    if isinstance(parallel, dict):
        facts["ranks"] = ", ".join(f"{name} {size}" for name, size in parallel.items() if size is not False)
    if isinstance(engine, dict):
        facts["engine"] = f"{engine.get('name', '?')} {engine.get('version', '')}".strip()
    if isinstance(run.summary.get("seconds"), (int, float)):
        facts["training"] = _duration(run.summary["seconds"])
    return facts


def _interval(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" ({100 * bounds[0]:.1f} to {100 * bounds[1]:.1f})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
