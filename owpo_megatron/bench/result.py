"""Result of a benchmark, as JSON and as a table: figures always come with machine and versions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from owpo_megatron.run.files import write_whole


@dataclass(frozen=True)
class BenchResult:
    """Rows of one benchmark. Keys of a row end in the unit.

    Example:
        BenchResult(machine={"cores": 2, ...}, versions={"torch": "2.13.0+cpu", ...}, command="owpo bench swap",
                    rows=[{"parameters": 1_000_000, "swap_ms": 0.15, "copy_ms": 2.1, "extra_peak_bytes": 0}])
    """

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    rows: Sequence[Mapping[str, Any]]
    figures: Mapping[str, Any] = field(default_factory=dict)  # main figures, at the top level of the JSON

    def write(self, file: Path) -> None:
        """Write the JSON atomically."""
        head = asdict(self)
        figures = head.pop("figures")
        write_whole(file, json.dumps(head | figures, indent=2) + "\n")

    def table(self) -> Table:
        """Return a table with one row per measurement, or one column each if there are few with many figures."""
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        if len(self.rows) < 4 < len(names) // 2:
            table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
            for name in names:
                table.add_row(name, *(_cell(row.get(name)) for row in self.rows))
            return table
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
        for name in names:
            numeric = all(isinstance(row.get(name, 0), (int, float)) for row in self.rows)
            table.add_column(name, justify="right" if numeric else "left")
        for row in self.rows:
            table.add_row(*(_cell(row.get(name)) for name in names))
        return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
