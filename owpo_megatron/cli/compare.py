"""owpo compare"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from owpo_megatron.cli.options import Overrides, err, note, out, wide
from owpo_megatron.config import Config
from owpo_megatron.hub import with_local_models
from owpo_megatron.run.layout import RunFolder

if TYPE_CHECKING:
    from owpo_megatron.experiments.compare import Cell
    from owpo_megatron.experiments.lab import Lab
    from owpo_megatron.experiments.pool import Failure, OnEvent
    from owpo_megatron.experiments.protocols import SelfEvolution, TwoStage
    from owpo_megatron.experiments.spec import RunSpec

Experiment = TypeVar("Experiment", "Lab", "TwoStage", "SelfEvolution")

LabFile = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="YAML file of the comparison.")]
NoRun = Annotated[bool, typer.Option("--no-run", help="Start no run; show the tables of the finished ones.")]
HEARTBEAT_SECONDS = 60.0
FEW_SEEDS = 3


def compare(config: LabFile, overrides: Overrides = None, no_run: NoRun = False) -> None:
    """Compare methods over seeds: same base model, data order and rollout budget; tables, figures, paired differences.

    Begins with the number of runs and the reference that each method gets: a method with a reference is given a fixed
    one, trained per seed (field `reference`), unless its entry has `reference: own` or the file `reference: null`.
    Methods without one are also run longer, by the reference's steps, for the column "equal compute".

    Uses every core. Finished runs are reused, and Ctrl-C loses no finished step: the same command resumes. Everything
    is in runs/NAME: runs/, table.json, table.md, curves.json, figures.

    Example: owpo compare -c examples/cpu-lab/lab.yaml seeds=[1,2]
    """
    from owpo_megatron.experiments.lab import Lab

    lab = with_local_run(Lab.load(config, overrides or ()), weights=not no_run)
    table, failures = make(lab, no_run)
    show(lab.folder, table)
    end(failures)


def with_local_run(section: Experiment, weights: bool) -> Experiment:
    """The settings of many runs with the models that their `run` names by hub downloaded.

    Raises:
        UserError: a model is neither here nor on the hub, or `run` is no configuration of a run.
    """
    named = Config.build(section.run)
    local = with_local_models(named, note, weights)
    if local is named:
        return section
    fields = local.model_dump(mode="json", exclude_unset=True, include={"model", "reference", "teachers"})
    return section.model_copy(update={"run": section.run | fields})


def make(lab: Lab, no_run: bool) -> tuple[dict[str, Any], list[Failure]]:
    """Run the comparison, or only collect finished runs, and return (table, failures)."""
    from owpo_megatron.experiments.compare import compare as make_comparison
    from owpo_megatron.experiments.compare import plan, specs_of, write_table

    cells = plan(lab)
    if no_run:
        return write_table(lab, cells), []
    for line in announcement(lab, cells):
        out.print(escape(line))
    with progress(specs_of(cells), lab.root) as tell:
        return make_comparison(lab, tell)


def announcement(lab: Lab, cells: Sequence[Cell]) -> list[str]:
    """Lines with the number of runs, their kinds, and the reference of each entry."""
    from owpo_megatron.experiments.compare import specs_of
    from owpo_megatron.experiments.pool import with_needs

    every = with_needs(specs_of(list(cells)))
    compared = {cell.run.key for cell in cells}
    longer = {cell.longer.key for cell in cells if cell.longer} - compared
    references = {one.key for cell in cells for one in cell.run.needs} - compared
    done = sum(spec.is_done(lab.root) for spec in every)
    parts = [f"{len(compared)} compared"]
    if references and lab.reference:
        parts.append(f"{len(references)} references ({lab.reference.method}, {lab.reference.steps} steps)")
    if longer:
        parts.append(f"{len(longer)} longer ones for the column equal compute")
    lines = [f"{len(every)} runs: {', '.join(parts)}" + (f"; {done} of them finished before" if done else "")]
    for entry in lab.methods:
        cell = next(one for one in cells if one.arm.label == entry.label)
        lines.append(f"  {entry.label}: {_reference_of(cell)}")
    return lines


def _reference_of(cell: Cell) -> str:
    from owpo_megatron.methods import make_method

    run = cell.run
    what = f"{run.config.optimizer.steps} steps"
    if run.start is not None:
        what += f", started from the trained reference ({run.start.label} and the like)"
    if make_method(cell.arm.method).needs_reference == "none":
        return f"{what}, no reference"
    if run.reference is None:
        settings = run.config.reference
        swaps = "fixed" if settings.refresh == "fixed" else f"swapped every {settings.every} steps"
        return f"{what}, its own initial policy as reference, {swaps}"
    refresh = run.config.reference.refresh
    swaps = "never swapped" if refresh == "fixed" else f"{refresh}, every {run.config.reference.every} steps"
    return f"{what}, the trained reference of its seed, {swaps}"


LEGEND = (
    "final: score after the last step. AUC: mean score over the whole curve. equal compute: score once the training of "
    "the reference counts as the method's own steps. ahead: paired by seed, with 95 % interval. ±: half of the 95 % "
    "interval over seeds (Student's t). token passes: forward and backward passes over tokens, in all."
)


def show(folder: Path, table: Mapping[str, Any]) -> None:
    """Print the tables of every regime with their legend, and write the figures."""
    from owpo_megatron.report.comparison import regime_table, write_comparison_figures, write_markdown

    console = wide()
    for regime, content in table["regimes"].items():
        if content["entries"]:
            console.print(regime_table(table, regime))
            console.print()
    console.print(LEGEND, style="dim")
    if len(table["seeds"]) < FEW_SEEDS:
        note = f"{len(table['seeds'])} seeds are few: intervals of Student's t are wide below {FEW_SEEDS}"
        console.print(f"[yellow]note:[/yellow] {note}")
    curves = json.loads((folder / "curves.json").read_text())
    figures = write_comparison_figures(table, curves, folder)
    write_markdown(table, folder / "table.md")
    out.print(f"[bold]{escape(str(folder / 'table.json'))}[/bold], figures: {', '.join(file.name for file in figures)}")


def end(failures: Sequence[Failure]) -> None:
    """Report the failures, and exit with the code they ask for."""
    for failure in failures:
        err.print(f"[bold red]failed:[/bold red] {escape(failure.spec.label)}: {escape(failure.reason)}")
    if failures:
        err.print("the same command repeats these runs only")
        raise typer.Exit(2 if any(failure.mistake for failure in failures) else 1)


@contextmanager
def progress(specs: Sequence[RunSpec], root: Path) -> Iterator[OnEvent]:
    """A bar over all runs on a terminal; into a file or a pipe a line per event, and a line a minute between them."""
    from owpo_megatron.experiments.pool import with_needs

    total = len(with_needs(specs))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    began, lock = time.monotonic(), threading.Lock()
    under_way: dict[str, RunSpec] = {}
    finished = 0
    over = threading.Event()

    def minutes() -> str:
        return f"{(time.monotonic() - began) / 60:.1f} min"

    def heartbeat() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            with lock:
                now = [f"{label} at step {_step(spec, root)}" for label, spec in sorted(under_way.items())]
            out.print(escape(f"{minutes():>9}  {finished} of {total} done; {', '.join(now) or 'starting'}"))

    with Progress(*columns, console=out, disable=not out.is_terminal) as bar:
        row = bar.add_task("runs", total=total)

        def tell(what: str, spec: RunSpec) -> None:
            nonlocal finished
            with lock:
                if what == "started":
                    under_way[spec.label] = spec
                else:
                    under_way.pop(spec.label, None)
                    finished += 1
                    bar.advance(row)
                bar.update(row, description=", ".join(sorted(under_way)) or "runs")
            if what != "cached" and (what != "started" or not out.is_terminal):
                out.print(escape(f"{minutes():>9}  {what:<8}{spec.label}") + f" [dim]({finished} of {total})[/dim]")

        if not out.is_terminal:
            threading.Thread(target=heartbeat, daemon=True).start()
        try:
            yield tell
        finally:
            over.set()


def _step(spec: RunSpec, root: Path) -> str:
    """Steps done of the steps wanted, from the run's metrics file."""
    file = RunFolder(spec.folder(root)).metrics
    lines = file.read_text().splitlines() if file.is_file() else []
    done = sum('"seconds"' in line for line in lines)
    return f"{done}/{spec.config.optimizer.steps}"
