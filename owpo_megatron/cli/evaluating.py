"""Show an evaluation (`owpo eval`): bars, tables, a figure. It is made by api/evaluation_jobs.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from owpo_megatron.api.evaluation_jobs import Job, Wish
from owpo_megatron.cli.options import err, note, out, wide
from owpo_megatron.evaluation.draw import DrawProgress
from owpo_megatron.evaluation.prepare import PreparedSet
from owpo_megatron.evaluation.targets import Target
from owpo_megatron.report.scores import Scored, beside_paper, details, score_tables, write_tables


def evaluate_all(
    jobs: Sequence[Job],
    wish: Wish,
    folder: Path | None,
    json_file: Path | None,
    papers: Mapping[str, str] | None = None,
) -> None:
    """Evaluate every target on its sets, print the tables, write table.json and a figure.

    Args:
        folder: of these two; None: beside the results.
        papers: the paper's model for each model, to show its numbers below the rows; None: do not.

    Raises:
        EngineError: an engine does not start, or stays dead; what was drawn is kept.
    """
    for complaint in dict.fromkeys(one for job in jobs for one in job.notes()):
        err.print(f"[yellow]note:[/yellow] {escape(complaint)}")
    scored = []
    for job in jobs:
        scores = _evaluate(job, wish)
        by_set = {str(one["set"]): one for one in scores}
        scored += [
            Scored(job.target.model, job.target.method, place, by_set) for place in job.target.checkpoints or ("",)
        ]
    _show(scored, _table_folder([job.target for job in jobs], folder), json_file, papers)


def _evaluate(job: Job, wish: Wish) -> list[dict[str, Any]]:
    target = job.target
    out.print(f"[bold]{escape(target.label)}[/bold]: {escape(str(target.weights))} -> {escape(str(target.out))}")
    for one in job.sets:
        rules = ", ".join(sorted(set(one.rules.values())))
        judge = f", reasoning by {escape(one.spec.chain)}" if one.spec.chain else ""
        graded = f"graded by {escape(rules)}{judge}"
        out.print(f"  {one.spec.title}: {len(one.prompts)} problems of {escape(one.origin)}, {graded}")
    with _bars() as bars:
        bars_of = partial(_bar, bars) if err.is_terminal else _lines
        return job.run(wish, bars_of, partial(_waiting, bars))


@contextmanager
def watching() -> Iterator[Callable[[PreparedSet], DrawProgress]]:
    """Yield the `watch` of `Job.run`: a bar for each set on a terminal, lines in a file."""
    with _bars() as bars:
        yield partial(_bar, bars) if err.is_terminal else _lines


def _bar(bars: Progress, prepared: PreparedSet) -> DrawProgress:
    """A set's progress on a terminal."""
    bar = bars.add_task(prepared.spec.title, total=None, right="")

    def told(done: int, total: int, right: int) -> None:
        bars.update(bar, completed=done, total=total, right=f"{right / done:.1%} right")

    return told


def _lines(prepared: PreparedSet) -> DrawProgress:
    """The same in a file: a line per tenth."""
    shown = 0

    def told(done: int, total: int, right: int) -> None:
        nonlocal shown
        if (tenth := 10 * done // total) > shown:
            shown = tenth
            note(f"  {prepared.spec.title}: {done} of {total} samples, {right / done:.1%} right")

    return told


@contextmanager
def _waiting(bars: Progress, what: str) -> Iterator[None]:
    """Show what takes long and has no measure: with its seconds on a terminal, as a line in a file."""
    if not err.is_terminal:
        note(f"  {what}")
    task = bars.add_task(what, total=None, right="")
    try:
        yield
    finally:
        bars.remove_task(task)


@contextmanager
def _bars() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn("{task.fields[right]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bars:
        yield bars


def _table_folder(targets: Sequence[Target], folder: Path | None) -> Path:
    if folder is not None:
        return folder
    return targets[0].out if len(targets) == 1 else targets[0].config.runs_dir / "eval"


def _show(scored: Sequence[Scored], folder: Path, json_file: Path | None, papers: Mapping[str, str] | None) -> None:
    tables = score_tables(scored)
    if papers is not None:
        tables = [beside_paper(table, papers) for table in tables]
    console = wide()
    for table in (*(one.rich() for one in tables), details(scored)):
        console.print()
        console.print(table)
    from owpo_megatron.report.score_plot import write_score_figure

    figure = write_score_figure(folder / "scores.png", scored)
    for file in (folder / "table.json", json_file):
        if file is not None:
            write_tables(file, tables, scored)
    out.print(f"\nwritten: {escape(str(folder / 'table.json'))}, {escape(str(figure))}; problem by problem: SET.jsonl")
