"""owpo report"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from owpo_megatron.cli.options import out
from owpo_megatron.errors import UserError

if TYPE_CHECKING:
    from owpo_megatron.samples import ShownSample


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Run folders, e.g. runs/quickstart.")],
    figures: Annotated[bool, typer.Option(help="Draw the figures and the page as well.")] = True,
) -> None:
    """Report on runs: a table here; figures and a self-contained page with samples in RUN_DIR/report/.

    Works while a run goes on. Several runs become columns of one table.

    Example: owpo report runs/quickstart runs/dapo
    """
    from owpo_megatron.report.table import summary_table
    from owpo_megatron.run.metrics_reader import read_run

    runs = [read_run(folder) for folder in run_dirs]
    out.print(summary_table(runs))
    if not figures:
        return
    from owpo_megatron.report.page import write_page
    from owpo_megatron.report.plots import write_figures

    for run in runs:
        folder = run.folder / "report"
        page = write_page(run, write_figures(run, folder), folder / "index.html", samples_of(run.folder))
        out.print(f"\nwritten: {escape(str(page))} and the figures beside it")


def samples_of(run_dir: Path) -> list[ShownSample]:
    """Samples for the page: a few steps from the first to the newest one. None without rollouts or a tokenizer."""
    from owpo_megatron.cli.samples import for_report
    from owpo_megatron.report.samples import PER_STEP, STEPS
    from owpo_megatron.run.layout import RunFolder
    from owpo_megatron.samples import recorded_steps

    try:
        steps = recorded_steps(RunFolder(run_dir))
        chosen = {steps[round(index * (len(steps) - 1) / (STEPS - 1))] for index in range(STEPS)}
        return for_report(run_dir, sorted(chosen), PER_STEP)
    except UserError as error:
        out.print(f"[dim]no samples on the page: {escape(error.remedy)}[/dim]")
        return []
