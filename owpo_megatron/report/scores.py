"""Evaluation scores as tables in the layout of the paper: a row per method, a column per set, best and converged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from owpo_megatron.report.published import AVERAGE, find_published, method_of
from owpo_megatron.run.files import write_whole

ORDER = ("best", "converged")  # of checkpoints; others follow as they come
NOTHING = "-"


@dataclass(frozen=True)
class Scored:
    """An evaluated checkpoint and its scores by set, as OUT/SET.json has them.

    Example:
        Scored("Qwen3-8B-Base", "owpo", "best", {"aime24": {"title": "AIME24", "metrics": {"pass@1": {...}}, ...}})
    """

    model: str
    method: str
    checkpoint: str  # "best", "converged", "step 80", or "" of a model
    sets: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ScoreTable:
    """A table of percentages: one row for each (model, method), one column for each (group, column).

    Example:
        ScoreTable("Pass@1", [("AIME24", "best"), ("AIME24", "converged")], [("Qwen3", "owpo")], [[44.38, 42.19]])
    """

    title: str
    columns: list[tuple[str, str]]
    rows: list[tuple[str, str]]
    cells: list[list[float | None]]  # percent; None: not evaluated
    places: list[tuple[str, str, str]] = field(default_factory=list)  # (set, metric, checkpoint) of each column

    def markdown(self) -> str:
        """The table for a document."""
        heads = ["model", "method", *(" ".join(column) for column in self.columns)]
        lines = [heads, ["---"] * 2 + ["---:"] * len(self.columns)]
        for (model, method), values in zip(self.rows, self.cells, strict=True):
            lines.append([model, method, *(NOTHING if value is None else f"{value:.2f}" for value in values)])
        return f"{self.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left", title_style="bold", box=None, header_style="bold")
        table.add_column("model")
        table.add_column("method")
        before = ""
        for group, name in self.columns:
            table.add_column(f"{group if group != before else ''}\n{name}", justify="right")
            before = group
        for (model, method), values in zip(self.rows, self.cells, strict=True):
            table.add_row(model, method, *(NOTHING if value is None else f"{value:.2f}" for value in values))
        return table


def score_tables(scored: Sequence[Scored]) -> list[ScoreTable]:
    """Those of the paper for which there is something to show.

    Pass@1 of the sets with Pass@k at every checkpoint (Table 2), Pass@1 beside Pass@k at each checkpoint (Tables 5 and
    6), mean accuracy of the others (Table 3). A model that has no checkpoints, such as the base, has the same scores at
    each. Rows and columns without a score are left out. "Average" is the mean over the sets of a table, where all are
    there.
    """
    titles = {name: str(scores["title"]) for one in scored for name, scores in one.sets.items()}
    metrics: dict[str, list[str]] = {}
    for one in scored:
        for name, scores in one.sets.items():
            known = metrics.setdefault(name, [])
            known += [metric for metric in scores["metrics"] if metric not in known]
    several = [name for name in titles if len(metrics[name]) > 1]
    single = [name for name in titles if len(metrics[name]) == 1]
    found = {one.checkpoint for one in scored}
    named = found - {""} or found  # a model without checkpoints is in the tables of all of them
    checkpoints = [name for name in ORDER if name in named] + sorted(named - set(ORDER))
    tables = []
    if several:
        if len(checkpoints) > 1:
            first = [(name, metrics[name][0], place) for name in several for place in checkpoints]
            tables.append(_table(metric_title(first[0][1]), scored, titles, first, "checkpoint"))
        for place in checkpoints:
            columns = [(name, metric, place) for name in several for metric in metrics[name]]
            heading = f"{place} checkpoint" if place in ORDER else place
            metric_names = " and ".join(dict.fromkeys(metric_title(metric) for _, metric, _ in columns))
            tables.append(_table(f"{heading}: {metric_names}".removeprefix(": "), scored, titles, columns, "metric"))
    if single:
        columns = [(name, metrics[name][0], place) for name in single for place in checkpoints]
        tables.append(_table("Mean accuracy", scored, titles, columns, "checkpoint"))
    return tables


def beside_paper(table: ScoreTable, models: Mapping[str, str]) -> ScoreTable:
    """The table with the paper's numbers below each row of a method that it has, and the differences to them.

    Args:
        models: the paper's model for each model of the table, see `published.paper_model`.
    """
    rows: list[tuple[str, str]] = []
    cells: list[list[float | None]] = []
    for (model, label), values in zip(table.rows, table.cells, strict=True):
        rows.append((model, label))
        cells.append(values)
        method = method_of(label)
        found = [find_published(models[model], method, *place) if method else None for place in table.places]
        if any(found):
            numbers = [one.percent if one else None for one in found]
            gaps = [None if None in pair else pair[0] - pair[1] for pair in zip(values, numbers, strict=True)]  # type: ignore[operator]
            rows += [("", f"  paper: {method}"), ("", "  difference")]
            cells += [numbers, gaps]
    return replace(table, rows=rows, cells=cells)


def details(scored: Sequence[Scored]) -> Table:
    """Every score with its interval, problems and samples."""
    table = Table(box=None, header_style="bold", title="With 95 % intervals", title_justify="left", title_style="bold")
    for name in ("evaluated", "set", "metric"):
        table.add_column(name)
    for name in ("score", "interval", "problems x samples", "tokens", "cut off"):
        table.add_column(name, justify="right")
    for one in scored:
        for scores in one.sets.values():
            for metric, value in scores["metrics"].items():
                table.add_row(
                    " ".join(part for part in (one.model, one.method, one.checkpoint) if part),
                    str(scores["title"]),
                    metric_title(metric),
                    f"{100 * value['value']:.2f}",
                    f"{100 * value['low']:.1f} - {100 * value['high']:.1f}",
                    f"{scores['problems']} x {scores['samples']}",
                    f"{scores['response_length']:.0f}",
                    f"{scores['truncated_share']:.1%}",
                )
    return table


def write_tables(file: Path, tables: Sequence[ScoreTable], scored: Sequence[Scored]) -> None:
    """Tables and everything behind them as JSON, at once or not at all."""
    content = {"tables": [asdict(one) for one in tables], "scores": [asdict(one) for one in scored]}
    write_whole(file, json.dumps(content, indent=1) + "\n")


def _table(
    title: str,
    scored: Sequence[Scored],
    titles: Mapping[str, str],
    wanted: Sequence[tuple[str, str, str]],
    second: str,
) -> ScoreTable:
    """`wanted`: (set, metric, checkpoint) of each column; `second`: what the lower heading names."""
    values = {
        (one.model, one.method, name, metric, one.checkpoint): 100 * value["value"]
        for one in scored
        for name, scores in one.sets.items()
        for metric, value in scores["metrics"].items()
    }

    def value_of(row: tuple[str, str], column: tuple[str, str, str]) -> float | None:
        return values.get((*row, *column), values.get((*row, *column[:2], "")))

    rows = [
        row
        for row in dict.fromkeys((one.model, one.method) for one in scored)
        if any(value_of(row, column) is not None for column in wanted)
    ]
    wanted = [column for column in wanted if any(value_of(row, column) is not None for row in rows)]
    headings = [place if second == "checkpoint" else metric_title(metric) for _, metric, place in wanted]
    columns = [(titles[name], heading) for (name, _, _), heading in zip(wanted, headings, strict=True)]
    cells = [[value_of(row, column) for column in wanted] for row in rows]
    keys = list(wanted)
    if len({name for name, _, _ in wanted}) > 1:
        for heading in dict.fromkeys(headings):
            places = [index for index, known in enumerate(headings) if known == heading]
            columns.append(("Average", heading))
            keys.append((AVERAGE, *wanted[places[0]][1:]))
            for row in cells:
                row.append(_mean([row[index] for index in places]))
    return ScoreTable(title, columns, rows, cells, keys)


def _mean(parts: Sequence[float | None]) -> float | None:
    """None where a part is missing: an average over fewer sets is another number."""
    known = [part for part in parts if part is not None]
    return sum(known) / len(known) if len(known) == len(parts) else None


def metric_title(name: str) -> str:
    """Name of a metric in tables and figures.

    Example:
        >>> metric_title("pass@16"), metric_title("cot_pass@1")
        ('Pass@16', 'CoT-Pass@1')
    """
    return name.replace("cot_pass@", "CoT-Pass@").replace("pass@", "Pass@")
