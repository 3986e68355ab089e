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

from owpo_megatron.api.run_folder import move_aside
from owpo_megatron.cli.options import Overrides, out, this_command
from owpo_megatron.cli.report import samples_of
from owpo_megatron.cli.running import run_trainer, say_moved
from owpo_megatron.config import Config
from owpo_megatron.engine.command import check_interpreter
from owpo_megatron.engine.install import project_files
from owpo_megatron.errors import UserError
from owpo_megatron.run.layout import RunFolder

EXAMPLE = project_files() / "examples" / "quickstart"


def quickstart(
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", metavar="FILE", help="Another recipe with a `task:` source."),
    ] = None,
) -> None:
    """Train a small model from start to end on this machine, and show what it learned.

    Makes a base model (kept for the next time), converts it to megatron, trains it with OWPO on a generated task with a
    real SGLang server, evaluates before and after, draws the figures. A finished quickstart is moved aside, an
    interrupted one goes on.
    """
    started = time.monotonic()
    file = config or EXAMPLE / "config.yaml"
    settings = Config.load(file, overrides or [])
    if not settings.data.source.startswith("task:"):
        remedy = "the quickstart knows base models for `task:` sources only"
        raise UserError("data.source", settings.data.source, remedy)
    if not settings.engine.urls:
        check_interpreter(settings.engine)  # before a base model is made in vain
    if RunFolder.of(settings).is_finished:
        say_moved(move_aside(settings.run_dir))
    base, converted = settings.model.path, settings.run_dir / "base_megatron"
    for folder in (base.parent, converted.parent):  # where none can be made, before a base model is made in vain
        folder.mkdir(parents=True, exist_ok=True)
    task = settings.data.source.removeprefix("task:")
    _say(1, f"a base model for the task {task}, warmed up on demonstrations ({base})")
    make_base_model(task, base)
    _say(2, f"converted to megatron ({converted})")
    if not converted.is_dir():
        _run("-m", "owpo_megatron.cli.main", "convert", "import", "--hf", str(base), "--out", str(converted))
    par = settings.parallel
    _say(3, "an SGLang server on this machine, its weights pushed by the trainer")
    _say(4, f"training with {settings.algorithm.name} on {par.world_size} ranks ({par.sizes})")
    _say(5, f"Pass@k on held-out problems, before and after ({settings.eval.samples} samples each)")
    settings = Config.load(file, [*(overrides or []), f"model.path={converted}"])
    if run_trainer(settings):
        _say(6, f"figures and the result as a Hugging Face folder ({RunFolder.of(settings).hf})")
        _report(settings)
        _show(settings, file, time.monotonic() - started)


def _say(number: int, text: str) -> None:
    out.print(f"[bold]{number}/6[/bold] {escape(text)}")


def make_base_model(task: str, out: Path) -> None:
    """Make a task's base model, or copy it from the cache."""
    _run(str(EXAMPLE / "base_model.py"), "--task", task, "--out", str(out))


def _run(*arguments: str) -> None:
    """Run a script in a separate process: this one stays light, and the steps are those that a user would type."""
    code = subprocess.run([sys.executable, *arguments]).returncode
    if code:
        raise typer.Exit(code)


def _report(settings: Config) -> None:
    from owpo_megatron.report.page import write_page
    from owpo_megatron.report.plots import write_figures
    from owpo_megatron.run.metrics_reader import read_run

    run, folder = read_run(settings.run_dir), RunFolder.of(settings).report
    write_page(run, write_figures(run, folder), folder / "index.html", samples_of(settings.run_dir))


def _show(settings: Config, file: Path, seconds: float) -> None:
    from owpo_megatron.report.table import summary_table
    from owpo_megatron.run.metrics_reader import read_run

    run_dir, recipe, owpo = escape(str(settings.run_dir)), escape(os.path.relpath(file)), escape(this_command())
    out.print()
    out.print(summary_table([read_run(settings.run_dir)]))
    out.print(f"\n{seconds:.0f} seconds in all. Next:")
    for command, why in (
        (f"xdg-open {run_dir}/report/index.html", "the figures on one page"),
        (f"{owpo} train -c {recipe} name=dapo algorithm.name=dapo", "the same without the reference"),
        (f"{owpo} eval -c {run_dir}/config.yaml eval.samples=32", "evaluate what it learned once more"),
        (f"{owpo} quickstart -c {os.path.relpath(EXAMPLE / 'countdown.yaml')}", "arithmetic: harder and slower"),
        (f"{owpo} doctor", "what this machine has"),
    ):
        out.print(f"  [bold]{command}[/bold]  [dim]{why}[/dim]")
