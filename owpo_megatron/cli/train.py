"""owpo train"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from owpo_megatron.cli.options import ConfigFile, Overrides, load_config, out, this_command
from owpo_megatron.cli.running import run_trainer


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over; the earlier run folder is moved aside.")] = False,
) -> None:
    """Train a policy. Starts its own engine and ranks, and resumes a run that was stopped.

    Ctrl-C lets the step finish and saves it; the same command goes on from there. Everything the run leaves is in
    runs/NAME: config.yaml, metrics.jsonl, summary.json, checkpoints/, logs/.

    Example: owpo train -c examples/quickstart/config.yaml optimizer.steps=10 parallel.tp=1
    """
    settings = load_config(config, overrides or [])
    if run_trainer(settings, fresh=fresh):
        out.print(f"figures and tables: [bold]{escape(this_command())} report {escape(str(settings.run_dir))}[/bold]")
