"""The shape of every benchmark's result, as JSON and as a table: figures never travel without machine and versions."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class BenchResult:
    """Rows of one benchmark. Keys of a row are plain words with the unit at the end.

    Example:
        BenchResult(machine={"cores": 2, ...}, versions={"torch": "2.13.0+cpu", ...}, command="owpo bench swap",
                    rows=[{"parameters": 1_000_000, "swap_ms": 0.15, "copy_ms": 2.1, "extra_peak_bytes": 0}])
    """

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    rows: Sequence[Mapping[str, Any]]

    def write(self, file: Path) -> None:
        """Write the JSON at once or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_name(file.name + ".tmp")
        scratch.write_text(json.dumps(asdict(self), indent=2) + "\n")
        os.replace(scratch, file)

    def table(self) -> Table:
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 3, 0, 0))
        names = list(dict.fromkeys(name for row in self.rows for name in row))
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
