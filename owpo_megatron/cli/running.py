"""Starts the trainer for a configuration: checks, run folder, ranks, exit code. Shared by train, eval, quickstart."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.markup import escape

from owpo_megatron.api.run_folder import Claim, claimed, move_aside
from owpo_megatron.cli.options import err, out
from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.run.layout import CONFIG, RunFolder, whole_steps


def run_trainer(
    config: Config,
    arguments: Sequence[str] = (),
    fresh: bool = False,
    keep_config: bool = True,
    module: str = "owpo_megatron.trainer.main",
) -> bool:
    """Run the trainer on this machine's ranks, or in this process where torchrun started it.

    Returns:
        True when it came to its end, False when it was stopped on request and can go on.

    Args:
        arguments: further arguments of the trainer.
        fresh: move an existing run folder aside first.
        keep_config: this configuration becomes the run folder's config.yaml.
        module: the trainer, as `python -m` takes it.

    Raises:
        UserError: preflight found a mistake, or another process works in this run folder.
        typer.Exit: the run failed; the reason was printed. Code 1, or 2 for a user's mistake.
    """
    from owpo_megatron.launch.local import run_ranks
    from owpo_megatron.launch.preflight import preflight
    from owpo_megatron.launched import launcher_leftovers, started_by_torchrun

    preflight(config)
    if started_by_torchrun():
        _run_this_rank(config, arguments, fresh, module)
        return True
    leftovers = ", ".join(f"{name}={value}" for name, value in launcher_leftovers().items())
    if leftovers:
        err.print(f"[yellow]note:[/yellow] {escape(leftovers)} in the environment: left by another launcher, not used")
    if fresh:
        say_moved(move_aside(config.run_dir))
    folder = RunFolder.of(config)
    with claimed(config, keep_config) as claim:
        _announce(claim, folder)
        outcome = run_ranks(
            ["--config", str(claim.config_file), *arguments],
            config.parallel.world_size,
            folder.logs,
            module,
            notify=lambda text: err.print(text, markup=False),
            lock=claim.lock,
        )
        if outcome.code == 2:
            claim.restore()
    if outcome.stopped:
        out.print(_kept_by(config.run_dir))
        if outcome.code:
            raise typer.Exit(outcome.code)
        return False
    if outcome.code:
        word = "error" if outcome.code == 2 else "failed"
        where = f" [dim](more in {escape(str(outcome.log))})[/dim]" if outcome.log and outcome.code != 2 else ""
        err.print(f"[bold red]{word}:[/bold red] {escape(outcome.reason)}{where}")
        raise typer.Exit(outcome.code)
    return True


def _kept_by(run_dir: Path) -> str:
    """Line about what a stopped run left on disk."""
    steps = whole_steps(RunFolder(run_dir).checkpoints)
    if not steps:
        return "stopped before the first checkpoint; nothing was kept, and the same command starts again from step 0"
    return f"stopped; saved up to step {steps[-1]}, and the same command resumes there"


def say_moved(aside: Path | None) -> None:
    if aside is not None:
        out.print(f"the earlier run is now {escape(str(aside))}")


def _announce(claim: Claim, folder: RunFolder) -> None:
    if not claim.resumes:
        return
    out.print(f"resuming {escape(str(folder.path))} (--fresh starts over and keeps this one aside)")
    if claim.changed:
        out.print(f"[yellow]changed since it was started:[/yellow] {escape(', '.join(claim.changed))}")


def _run_this_rank(config: Config, arguments: Sequence[str], fresh: bool, module: str) -> None:
    if fresh:
        raise UserError("--fresh", True, "torchrun's ranks would race for the folder: move it aside by hand")
    rank = int(os.environ["RANK"])
    name = CONFIG if rank == 0 else f"logs/config_rank_{rank}.yaml"
    config.save(config.run_dir / name)
    sys.argv = [module, "--config", str(config.run_dir / name), *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
