"""owpo data: what is in a set of problems, before a run trains on it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from owpo_megatron.cli.options import JsonFile, err, out
from owpo_megatron.errors import UserError

if TYPE_CHECKING:
    from owpo_megatron.data import Problem
    from owpo_megatron.data.contamination import SetContamination
    from owpo_megatron.data.faults import Conflict
    from owpo_megatron.data.report import DataReport

data = typer.Typer(no_args_is_help=True, help="Look at training data.")
SHOWN = 5  # examples of a fault on the screen; the JSON has all


@data.callback()
def _frame() -> None:
    """Look at training data."""


@data.command("check")
def check(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A .jsonl, .json, .parquet or .csv file, task:NAME, or hub:OWNER/NAME."),
    ],
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="SET", help="An evaluation set: a source like SOURCE, or a name (aime24). Repeatable."),
    ] = None,
    overlap: Annotated[
        float, typer.Option(min=0.05, max=1.0, help="Share of an evaluation problem's word sequences that counts.")
    ] = 0.8,
    rule: Annotated[str, typer.Option(help="The verifier's rule, which has to read the answers.")] = "auto",
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="NAME=COLUMN", help="As data.columns: problem=question. Repeatable."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Find repeats, contradictions, doubtful or unreadable answers, and evaluation problems in training data.

    Names like aime24 are looked for in the folder that OWPO_DATA names, then on the hub. A run can leave out what is
    found: data.leave_out and data.against (docs/data.md).

    Example: owpo data check dapo-math-17k.parquet --against aime24.jsonl --against amc23.jsonl --json report.json
    """
    from owpo_megatron.config.verifier import known_rule
    from owpo_megatron.data.report import check_data

    try:
        known_rule(rule)
    except ValueError as error:
        raise UserError("--rule", rule, str(error)) from error
    sets = {name: _evaluation_set(name) for name in against or ()}
    with Progress(TextColumn("data"), BarColumn(), TimeElapsedColumn(), console=err, transient=True) as bar:
        task = bar.add_task("data", total=None)
        names = _columns(columns or ())

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        report = check_data(source, sets, overlap, show, rule, names)
    _show(report)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n")
        out.print(f"written: {escape(str(json_file))}")


def _columns(pairs: Sequence[str]) -> dict[str, str]:
    from owpo_megatron.config.data import COLUMNS

    found = {name: column for name, _, column in (pair.partition("=") for pair in pairs)}
    for name, column in found.items():
        if name not in COLUMNS or not column:
            raise UserError("--column", f"{name}={column}", f"write NAME=COLUMN, NAME one of {', '.join(COLUMNS)}")
    return found


def _evaluation_set(name: str) -> list[Problem]:
    from owpo_megatron.data import read_problems
    from owpo_megatron.evaluation.prepare import read_problems as read_set
    from owpo_megatron.evaluation.sets import SETS, source_of

    if name not in SETS:
        return list(read_problems(name, "--against"))
    folder = os.environ.get("OWPO_DATA")
    return read_set(source_of(SETS[name], Path(folder) if folder else None), seed=0)


def _show(report: DataReport) -> None:
    faults = report.faults
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    for what, count, note in (
        ("rows", faults.rows, f"{faults.integers} integer answers, {faults.chinese} in Chinese"),
        ("different texts", faults.texts, f"{faults.problems} different in letters and digits"),
        ("repeated", faults.repeated, "same text and answer as an earlier row"),
        ("contradictory", len(faults.contradictory), "texts with several answers: " + _conflicts(faults.contradictory)),
        ("lookalike", len(faults.lookalike), "the same by letters and digits alone: " + _conflicts(faults.lookalike)),
        ("same id", faults.same_id, "rows with the id of an earlier one; a run calls them ID#2, ID#3"),
        ("unreadable", len(faults.unreadable), "answers that no response can equal: " + _unreadable(faults.unreadable)),
        ("long_answer", len(faults.long_answers), "over 15 digits: " + _first([a for _, a in faults.long_answers])),
    ):
        table.add_row(what, str(count), escape(note.rstrip(": ")))
    out.print(f"[bold]{escape(report.source)}[/bold]")
    out.print(table)
    if report.against:
        out.print(f"\n[bold]Evaluation problems in it[/bold] (at least {report.overlap:.0%} of their word sequences)")
        out.print(_contamination(report.against))


def _contamination(sets: tuple[SetContamination, ...]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("set")
    for name in ("problems", "the same", "inside one", "similar", "share"):
        table.add_column(name, justify="right")
    table.add_column("for example")
    for one in sets:
        found = one.same + one.inside + one.similar
        pairs = [f"{match.eval_id} in {match.train_id}" for match in one.matches if match.kind == "same"]
        counts = (one.problems, one.same, one.inside, one.similar)
        share = f"{found / one.problems:.0%}" if one.problems else "-"
        table.add_row(escape(one.source.rpartition("/")[2]), *map(str, counts), share, escape(_first(pairs, 2)))
    return table


def _conflicts(found: tuple[Conflict, ...]) -> str:
    return _first([f"{conflict.ids[0]} ({' or '.join(sorted(set(conflict.answers)))})" for conflict in found])


def _unreadable(found: tuple[tuple[str, str, str], ...]) -> str:
    counts = Counter(why for _, why, _ in found)
    by_reason = ", ".join(f"{count} {why}" for why, count in counts.most_common())
    return by_reason + (f" (ids {_first([name for name, _, _ in found])})" if found else "")


def _first(texts: list[str], shown: int = SHOWN) -> str:
    return ", ".join(texts[:shown]) + (", ..." if len(texts) > shown else "")
