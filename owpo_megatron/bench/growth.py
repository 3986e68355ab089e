"""owpo bench growth: how a step's cost grows with tokens, vocabulary, group size and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from owpo_megatron.bench.step import Log, OurSide, bench_step
from owpo_megatron.bench.step_workload import Workload


def bench_growth(workload: Workload, steps: int, log: Log) -> list[dict[str, Any]]:
    """Measure a workload, then with one size changed at a time.

    Args:
        steps: counted steps of each; results are medians.

    Returns:
        A row per case: seconds, CPU seconds and their ratios to the first case, and the peak memory of a trainer's rank
        and of SGLang's scheduler.
    """
    one = OurSide()
    cases = {
        "as it is": (workload, one),
        "response x 2": (replace(workload, response=2 * workload.response), one),
        "vocabulary x 4": (replace(workload, vocab=4 * workload.vocab), one),
        "group x 2": (replace(workload, group=2 * workload.group), one),
        "2 ranks": (workload, OurSide(ranks=2)),
        "4 ranks": (workload, OurSide(ranks=4)),
    }
    rows: list[dict[str, Any]] = []
    for name, (changed, our) in cases.items():
        found = bench_step(changed, our, steps, lambda text, name=name: log(f"{name}: {text}"))  # type: ignore[misc]
        rows.append(_row(name, found, rows[0] if rows else None))
    return rows


def _row(name: str, found: Mapping[str, Any], base: Mapping[str, Any] | None) -> dict[str, Any]:
    row = {"case": name, "seconds": found["seconds_per_step"], "cpu_seconds": found["cpu_seconds_per_step"]}
    row |= found["phases"]
    base = base or row
    peaks = found["peak_bytes"]
    return row | {
        "ratio": row["seconds"] / base["seconds"],
        "cpu_ratio": row["cpu_seconds"] / base["cpu_seconds"],
        "rank_peak_mb": peaks["ours: ranks of the trainer"] >> 20,
        "scheduler_peak_mb": peaks["ours: SGLang, scheduler"] >> 20,
    }
