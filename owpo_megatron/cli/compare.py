"""owpo compare"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from owpo_megatron.cli.options import Overrides, err, out, wide

if TYPE_CHECKING:
    from owpo_megatron.experiments.lab import Lab
    from owpo_megatron.experiments.pool import Failure, Tell
    from owpo_megatron.experiments.spec import RunSpec


LabFile = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="YAML file of the comparison.")]
NoRun = Annotated[bool, typer.Option("--no-run", help="Make no run: the tables of what is there.")]


def compare(config: LabFile, overrides: Overrides = None, no_run: NoRun = False) -> None:
    """Compare methods over seeds: same base, data order and rollout budget; tables, figures, paired differences.

    Uses every core. Runs that are there already are not made again, and Ctrl-C loses no finished step: the same command
    goes on. Tables give equal steps and equal total compute (with the reference's training) side by side. Everything is
    in runs/NAME: runs/, table.json, table.md, curves.json, figures.

    Example: owpo compare -c examples/cpu-lab/lab.yaml seeds=[1,2]
    """
    from owpo_megatron.experiments.lab import Lab

    lab = Lab.load(config, overrides or ())
    table, failures = make(lab, no_run)
    show(lab.folder, table)
    end(failures)


def make(lab: Lab, no_run: bool) -> tuple[dict[str, Any], list[Failure]]:
    """The comparison's table and what failed, with a bar over its runs; without runs where none is wanted."""
    from owpo_megatron.experiments.compare import compare as make_comparison
    from owpo_megatron.experiments.compare import plan, specs_of, write_table

    if no_run:
        return write_table(lab, plan(lab)), []
    with progress(specs_of(plan(lab))) as tell:
        return make_comparison(lab, tell)


def show(folder: Path, table: Mapping[str, Any]) -> None:
    """The tables of every regime, and where the figures are."""
    from owpo_megatron.report.comparison import regime_table, write_comparison_figures, write_markdown

    console = wide()
    for regime, content in table["regimes"].items():
        if content["entries"]:
            console.print(regime_table(table, regime))
            console.print()
    curves = json.loads((folder / "curves.json").read_text())
    figures = write_comparison_figures(table, curves, folder)
    write_markdown(table, folder / "table.md")
    out.print(f"[bold]{escape(str(folder / 'table.json'))}[/bold], figures: {', '.join(file.name for file in figures)}")


def end(failures: Sequence[Failure]) -> None:
    """Say what failed, and with which exit code the command ends."""
    for failure in failures:
        err.print(f"[bold red]failed:[/bold red] {escape(failure.spec.label)}: {escape(failure.reason)}")
    if failures:
        err.print("the same command makes these again, and nothing else")
        raise typer.Exit(2 if any(failure.mistake for failure in failures) else 1)


@contextmanager
def progress(specs: Sequence[RunSpec]) -> Iterator[Tell]:
    """A bar over all runs with those under way; into a file or a pipe, a line a run."""
    from owpo_megatron.experiments.pool import with_needs

    total = len(with_needs(specs))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=out, disable=not out.is_terminal) as bar:
        row, under_way = bar.add_task("runs", total=total), set[str]()

        def tell(what: str, spec: RunSpec) -> None:
            (under_way.add if what == "started" else under_way.discard)(spec.label)
            if what in ("cached", "done", "failed"):
                bar.advance(row)
            bar.update(row, description=", ".join(sorted(under_way)) or "runs")
            if what in ("done", "failed"):
                out.print(f"{what:<7}{escape(spec.label)}")

        yield tell
