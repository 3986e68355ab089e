"""The files that hold records: JSON lines, JSON, Parquet and CSV, each record with the place that messages name."""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from owpo_megatron.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
MAX_CSV_FIELD = 1 << 24  # characters


def records_of(
    path: Path, columns: Collection[str] | None = None, field: str = "data.source"
) -> Iterator[tuple[str, Any]]:
    """(place, record) of every record of a file, one at a time; `place` is file:line, or file:row for Parquet.

    Args:
        columns: the columns of a Parquet file that are needed; None: all.
        field: named where the file itself is at fault.

    Raises:
        UserError: the file cannot be read, or a line of it.
    """
    if path.suffix == ".parquet":
        return _parquet(path, columns, field)
    return {".jsonl": _json_lines, ".json": _json, ".csv": _csv}[path.suffix](path)


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair cannot be printed
    return text if len(text) <= 80 else text[:77] + "..."


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
                shown = line.decode(errors="replace").strip()
                raise UserError(
                    place, short(shown), f"is not JSON ({error}); write one JSON object per line"
                ) from error


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        remedy = f"is not JSON ({error}); write a list of objects, or name a file of JSON lines .jsonl"
        raise UserError(str(path), path.name, remedy) from error
    if isinstance(content, dict):  # {"data": [...]}, as some tools write it
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(lists) == 1 else None
    if not isinstance(content, list):
        raise UserError(str(path), path.name, "must hold a list of objects")
    for number, record in enumerate(content, start=1):
        yield f"{path}:{number}", record


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(MAX_CSV_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as stream:
        rows = csv.DictReader(stream)
        try:
            for record in rows:
                place = f"{path}:{rows.line_num}"
                if None in record:
                    raise UserError(place, short(record[None]), "has more fields than the first line has names")
                yield place, record
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path}:{rows.line_num + 1}", "", f"cannot be read as CSV in UTF-8 ({error})") from error


def _parquet(path: Path, columns: Collection[str] | None, field: str) -> Iterator[tuple[str, Any]]:
    """Some thousand rows at a time."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = [name for name in file.schema_arrow.names if columns is None or name in columns]
        if not names and file.schema_arrow.names:
            names = file.schema_arrow.names  # none of ours: a message will name them
        for batch in file.iter_batches(batch_size=4096, columns=names):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", record
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(field, path, f"cannot be read as Parquet: {short(str(error))}") from error
