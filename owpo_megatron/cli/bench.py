"""owpo bench: what parts of the stack cost on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from owpo_megatron.cli.options import ConfigFile, JsonFile, Overrides, out
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
