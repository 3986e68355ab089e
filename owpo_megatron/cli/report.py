"""owpo report"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from owpo_megatron.cli.options import out


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run folders, e.g. runs/quickstart.")],
    figures: Annotated[bool, typer.Option(help="Draw the figures and the page, not the table alone.")] = True,
) -> None:
    """Show what runs did: a table here; figures and a self-contained page in RUN_DIR/report/.

    Works while a run goes on. Several runs stand side by side in the table.

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
        page = write_page(run, write_figures(run, folder), folder / "index.html")
        out.print(f"\nwritten: {escape(str(page))} and the figures beside it")
