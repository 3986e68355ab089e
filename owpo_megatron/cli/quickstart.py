"""owpo quickstart"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

import owpo_megatron
from owpo_megatron.cli.options import Overrides, out
from owpo_megatron.cli.running import move_aside, run_trainer
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError

EXAMPLE = Path(owpo_megatron.__file__).resolve().parents[1] / "examples" / "quickstart"


def quickstart(
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="Another recipe with a `task:` source."),
    ] = None,
) -> None:
    """Train a small model from start to end on this machine, and show what it learned.

    Makes a base model (kept for the next time), trains it with OWPO on a generated task with a real SGLang server,
    evaluates before and after. A finished quickstart is moved aside, an interrupted one goes on.
    """
    started = time.monotonic()
    if not EXAMPLE.is_dir():
        raise UserError("examples/quickstart", EXAMPLE, "not beside the package; run it from a clone of the project")
    file = config or EXAMPLE / "config.yaml"
    settings = Config.load(file, overrides or [])
    if (settings.run_dir / "summary.json").is_file():
        move_aside(settings.run_dir)
    _ensure_base_model(settings)
    if run_trainer(settings):
        _show(settings, file, time.monotonic() - started)


def _ensure_base_model(settings: Config) -> None:
    """In a process of its own: this one stays light, and the model is made the same way as by hand."""
    if not settings.data.source.startswith("task:"):
        raise UserError(
            "data.source", settings.data.source, "the quickstart knows base models for `task:` sources only"
        )
    task = settings.data.source.removeprefix("task:")
    command = [sys.executable, str(EXAMPLE / "base_model.py"), "--task", task, "--out", str(settings.model.path)]
    code = subprocess.run(command).returncode
    if code:
        raise typer.Exit(code)


def _show(settings: Config, file: Path, seconds: float) -> None:
    from owpo_megatron.report.metrics import read_run
    from owpo_megatron.report.table import summary_table

    run_dir, recipe = escape(str(settings.run_dir)), escape(os.path.relpath(file))
    out.print()
    out.print(summary_table([read_run(settings.run_dir)]))
    out.print(f"\n{seconds:.0f} seconds in all. Next:")
    for command, why in (
        (f"owpo report {run_dir}", "figures and a page of this run"),
        (f"owpo train -c {recipe} name=dapo algorithm.name=dapo", "the same without the reference"),
        (f"owpo eval -c {run_dir}/config.yaml eval.samples=32", "evaluate what it learned once more"),
        ("owpo doctor", "what this machine has"),
    ):
        out.print(f"  [bold]{command}[/bold]  [dim]{why}[/dim]")
