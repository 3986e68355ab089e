"""owpo bench step, start and growth: whole training steps."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import typer

from owpo_megatron.cli.bench import bench, progress, report_rows
from owpo_megatron.cli.options import JsonFile

WorkloadName = Annotated[str, typer.Option("--workload", help="small, medium or long.")]


def step(
    workload: WorkloadName = "small",
    against: Annotated[
        Literal["none", "trl"], typer.Option(help="Take turns with TRL's GRPOTrainer, in an environment of its own.")
    ] = "none",
    pairs: Annotated[int, typer.Option(min=1, help="Counted steps of each side; results are medians.")] = 5,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Data-parallel ranks of the trainer; default: one per core, at most 2.")
    ] = None,
    engines: Annotated[int, typer.Option(min=1, help="SGLang servers of our side (engine.count).")] = 1,
    deterministic: Annotated[
        bool, typer.Option(help="Responses do not depend on what else is generated (rollout.deterministic).")
    ] = True,
    microbatch: Annotated[
        int | None, typer.Option(min=1, help="Samples that TRL passes through its model at a time; default: all.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Time whole training steps (GRPO with a reference, real SGLang, fixed lengths, float32), alone or against TRL.

    Example: owpo bench step --workload medium --against trl --json step.json
    """
    from owpo_megatron.bench.step import OurSide, bench_step, find_workload

    sizes, our = find_workload(workload), OurSide(ranks or _ranks(), engines, deterministic)
    with progress("step") as log:
        figures = bench_step(sizes, our, pairs, log, None if against == "none" else against, microbatch)
    report_rows(_sides(figures), json_file, {"workload": workload} | figures)


def start(
    workload: WorkloadName = "small",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each kind; results are medians.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Time `owpo train` from the command to its first step, with an engine of its own and with a warm one.

    Example: owpo bench start --json start.json
    """
    from owpo_megatron.bench.start import bench_start
    from owpo_megatron.bench.step import find_workload

    sizes = find_workload(workload)
    with progress("start") as log:
        rows, figures = bench_start(sizes, _ranks(), rounds, log)
    report_rows(rows, json_file, {"workload": workload} | figures)


def growth(
    workload: WorkloadName = "medium",
    steps: Annotated[int, typer.Option(min=1, help="Counted steps of each case; results are medians.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Show how a step's time and memory grow: response x 2, vocabulary x 4, group x 2, and with 1, 2 and 4 ranks.

    Example: owpo bench growth --json growth.json
    """
    from owpo_megatron.bench.growth import bench_growth
    from owpo_megatron.bench.step import find_workload

    sizes = find_workload(workload)
    with progress("growth") as log:
        rows = bench_growth(sizes, steps, log)
    report_rows(rows, json_file, {"workload": workload})


def _ranks() -> int:
    """A rank per core, at most 2."""
    return min(2, len(os.sched_getaffinity(0)))


def _sides(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per side: seconds of a step and of its phases."""
    rows = [{"side": "ours", "seconds": figures["seconds_per_step"], **figures["phases"]}]
    if "ratio" in figures:
        rows.append({"side": "trl", "seconds": figures["peer_seconds_per_step"], **figures["peer_phases"]})
        rows.append({"side": "ours / trl, median of pairs", "seconds": figures["ratio"]})
    return rows


bench.command("step")(step)
bench.command("start")(start)
bench.command("growth")(growth)
