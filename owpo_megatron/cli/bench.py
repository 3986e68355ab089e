"""owpo bench: what parts of the stack cost on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from owpo_megatron.cli.options import ConfigFile, JsonFile, Overrides, err, out
from owpo_megatron.config import Config

bench = typer.Typer(no_args_is_help=True, help="Measure parts of the stack on this machine.")


@bench.callback()
def _frame() -> None:
    """Measure parts of the stack on this machine. Every result carries machine and versions."""


@bench.command("swap")
def swap(
    config: ConfigFile,
    overrides: Overrides = None,
    repeats: Annotated[int, typer.Option(min=1, help="Swaps that are timed.")] = 20,
    json_file: JsonFile = None,
) -> None:
    """Time the hard swap of the reference, and a copy of the same weights for comparison."""
    settings = Config.load(config, overrides or [])
    from owpo_megatron.trainer.bench_swap import measure

    report_rows(measure(settings, repeats), json_file)


@bench.command("verifier")
def verifier(
    workers: Annotated[int, typer.Option(min=1, help="Measured with 1 and with this many grading processes.")] = 2,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds from the start of grading one answer.")] = 4.0,
    fuzz: Annotated[int, typer.Option(min=0, metavar="COUNT", help="Grade this many random inputs instead.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the made answers.")] = 1,
    json_file: JsonFile = None,
) -> None:
    """Verifications a second against math-verify called directly, and a batch with hostile answers in it."""
    from owpo_megatron.verifiers import bench as verifier_bench

    with err.status("verifier") as status:
        if fuzz:
            rows = verifier_bench.fuzz(fuzz, workers, timeout, seed, status.update)
        else:
            rows = verifier_bench.measure(sorted({1, workers}), timeout, seed, status.update)
    report_rows(rows, json_file)


@bench.command("head")
def head(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to measure.")] = "cpu",
    tokens: Annotated[int, typer.Option(min=1, help="Rows of hidden states.")] = 4096,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size.")] = 512,
    vocab: Annotated[int, typer.Option(min=2, help="Vocabulary.")] = 32768,
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each; the median is given.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: every core.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Forward and backward of the LM head: ours against dense autograd and torch.compile, at 100/60/40 % of rows."""
    import os

    import torch

    from owpo_megatron.algorithms import make_objective
    from owpo_megatron.kernels.bench import HeadProblem, measure

    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    problem = HeadProblem.random(tokens, hidden, vocab, device)
    report_rows(measure(problem, make_objective("owpo"), repeats=repeats), json_file)


def report_rows(rows: Sequence[Mapping[str, Any]], json_file: Path | None) -> None:
    """Print a benchmark's rows and write them with what they depend on."""
    from owpo_megatron.launch.machine import machine, versions
    from owpo_megatron.report.bench import BenchResult

    command = shlex.join(["owpo", *sys.argv[1:]])
    result = BenchResult(machine(), versions(), command, rows)
    out.print(result.table())
    if json_file is not None:
        result.write(json_file)
        out.print(f"written: {escape(str(json_file))}")
