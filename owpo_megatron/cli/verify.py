"""owpo verify: grade answers from a file, one verdict per line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from owpo_megatron.cli.options import err, out, writable
from owpo_megatron.verifiers.rules import RULE_NAMES

if TYPE_CHECKING:
    from owpo_megatron.types import Verdict
    from owpo_megatron.verifiers.cases import Case

CHUNK = 256  # items handed to the pool at a time


def verify(
    cases: Annotated[Path, typer.Argument(metavar="CASES.jsonl", help="Lines of {id, gold, prediction, form}.")],
    rule: Annotated[
        str,
        typer.Option(help=f"{', '.join(RULE_NAMES)}, python:module:function, or a URL."),
    ] = "math",
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json", metavar="FILE", help="Write a line {id, correct, reason, seconds} per case.", callback=writable
        ),
    ] = None,
    golds: Annotated[
        bool, typer.Option("--golds", help="CASES is a data set of {id, answer}: grade each answer against itself.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Grading processes.")] = 2,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds from the start of grading one answer.")] = 4.0,
    memory_gb: Annotated[float, typer.Option(min=0.25, help="Address space of a grading process.")] = 2.0,
    proxy: Annotated[bool, typer.Option("--proxy", help="Reach a URL through the environment's proxy.")] = False,
) -> None:
    """Grade answers and show why each is right or wrong. Where cases carry `expected`, count the agreement."""
    from owpo_megatron.verifiers.cases import read_cases, read_golds

    read = (read_golds if golds else read_cases)(cases, rule)
    verdicts = _grade(read, rule, workers, timeout, memory_gb, proxy)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        with json_file.open("w", encoding="utf-8") as file:
            for case, verdict in zip(read, verdicts, strict=True):
                line = {"id": case.id, "correct": verdict.correct, "reason": verdict.reason}
                file.write(json.dumps(line | {"seconds": round(verdict.seconds, 6)}) + "\n")
    _summarise(read, verdicts)
    if golds:
        _show_unreadable(read, rule)
    if json_file is not None:
        out.print(f"written: {escape(str(json_file))}")


def _grade(
    cases: Sequence[Case], rule: str, workers: int, timeout: float, memory_gb: float, proxy: bool
) -> list[Verdict]:
    from owpo_megatron.verifiers import VerifierPool
    from owpo_megatron.verifiers.rules import find_rule

    rules = {name: find_rule(name, proxy) for name in {rule, *(case.item.domain for case in cases)}}
    pool = VerifierPool(rules, workers, timeout, memory_bytes=int(memory_gb * 2**30))
    columns = (TextColumn("verify"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=err, transient=True) as progress:
            bar = progress.add_task("verify", total=len(cases))
            starts = range(0, len(cases), CHUNK)
            gradings = [pool.submit([case.item for case in cases[start : start + CHUNK]]) for start in starts]
            verdicts: list[Verdict] = []
            for grading in gradings:
                while not grading.wait(0.1):
                    progress.update(bar, completed=len(verdicts) + grading.finished)
                verdicts += grading.result()
                progress.update(bar, completed=len(verdicts))
    finally:
        pool.close()
    return verdicts


def _show_unreadable(cases: Sequence[Case], rule: str) -> None:
    """Gold answers that equal themselves and nothing that a response would contain."""
    from owpo_megatron.verifiers.golds import unreadable

    reasons: dict[str, list[str]] = {}
    for case in cases:
        why = unreadable(case.item.answer, rule)
        if why:
            reasons.setdefault(why, []).append(case.id)
    for why, ids in reasons.items():
        shown = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
        out.print(f"[yellow]{len(ids)} that no response can equal ({why}):[/yellow] {escape(shown)}")


def _summarise(cases: Sequence[Case], verdicts: Sequence[Verdict]) -> None:
    reasons = Counter(verdict.reason for verdict in verdicts)
    slowest = max((verdict.seconds for verdict in verdicts), default=0.0)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(reasons.items()))
    out.print(f"{len(verdicts)} verdicts: {counts}; slowest {slowest:.2f} s")
    failed = next((verdict for verdict in verdicts if verdict.detail), None)
    if failed is not None:
        out.print(f"[yellow]{failed.reason}:[/yellow] {escape(failed.detail)}")
    judged = [(case, verdict) for case, verdict in zip(cases, verdicts, strict=True) if case.expected is not None]
    if judged:
        out.print(_agreement(judged))
    late = [case.id for case, verdict in zip(cases, verdicts, strict=True) if verdict.seconds > (case.limit_s or 1e9)]
    if late:
        out.print(f"[yellow]over their limit_s:[/yellow] {escape(', '.join(late))}")


def _agreement(judged: Sequence[tuple[Case, Verdict]]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("suite")
    for name in ("rows", "right", "false positives", "false negatives"):
        table.add_column(name, justify="right")
    suites: dict[str, list[tuple[Case, Verdict]]] = {}
    for case, verdict in judged:
        suites.setdefault(f"{case.suite}{' (rule-specific)' if case.rule_specific else ''}", []).append((case, verdict))
    if len(suites) > 1:
        suites["all, not rule-specific"] = [pair for pair in judged if not pair[0].rule_specific]
    for suite, pairs in suites.items():
        positives = sum(verdict.correct and not case.expected for case, verdict in pairs)
        negatives = sum(bool(case.expected) and not verdict.correct for case, verdict in pairs)
        right = len(pairs) - positives - negatives
        table.add_row(escape(suite), *map(str, (len(pairs), right, positives, negatives)))
    return table
