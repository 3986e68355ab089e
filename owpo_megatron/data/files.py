"""The files that hold records: JSON lines, JSON, Parquet and CSV, each record with the place that messages name.

All but Parquet may be compressed by gzip (`train.jsonl.gz`).
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, cast

from owpo_megatron.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(9), *range(11, 32), 127)}  # a message must not move the cursor
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
    kind = suffix_of(path)
    if kind == ".parquet":
        return _parquet(path, columns, field)
    return _whole({".jsonl": _json_lines, ".json": _json, ".csv": _csv}[kind](path), path, field)


def suffix_of(path: Path) -> str:
    """The kind of a file by its name, `.gz` apart; "" for one that is not read.

    Example:
        >>> suffix_of(Path("a/train.jsonl.gz")), suffix_of(Path("train.txt")), suffix_of(Path("a.parquet.gz"))
        ('.jsonl', '', '')
    """
    packed = path.suffix == ".gz"
    kind = path.with_suffix("").suffix if packed else path.suffix
    return kind if kind in SUFFIXES and not (packed and kind == ".parquet") else ""


def _whole(records: Iterator[tuple[str, Any]], path: Path, field: str) -> Iterator[tuple[str, Any]]:
    try:
        yield from records
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(field, path, f"cannot be unpacked by gzip: {error}") from error


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _loads(text: bytes) -> Any:
    return json.loads(text, object_pairs_hook=_each_once)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a field that an object has twice: Python would use the last one without a word."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there twice")
    return fields


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("utf-8", "backslashreplace").decode().translate(_CONTROL)  # half a surrogate cannot be printed
    return text if len(text) <= 80 else text[:77] + "..."


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                yield place, _loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or nested without end
                shown = line.decode(errors="replace").strip()
                remedy = "write one JSON object per line"
                if shown in ("[", "{", "[{"):
                    remedy += ", or name a file with a list of objects over several lines .json"
                raise UserError(place, short(shown), f"is not JSON ({error}); {remedy}") from error


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with _opened(path) as file:
            content = _loads(file.read())
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
    with io.TextIOWrapper(_opened(path), encoding="utf-8-sig", newline="") as stream:
        try:
            rows = csv.DictReader(stream, delimiter=_delimiter(stream), skipinitialspace=True)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:1", path.name, f"cannot be read as CSV in UTF-8 ({error})") from error
        try:
            for record in rows:
                place = f"{path}:{rows.line_num}"
                if None in record:
                    raise UserError(place, short(record[None]), "has more fields than the first line has names")
                yield place, record
        except (csv.Error, UnicodeDecodeError) as error:
            place = f"{path}:{rows.line_num + 1}"
            raise UserError(place, path.name, f"cannot be read as CSV in UTF-8 ({error})") from error


def _delimiter(stream: IO[str]) -> str:
    """Return what divides the names in the first line: a semicolon or a tab where it has no comma."""
    first = stream.readline()
    stream.seek(0)
    return next((sign for sign in (";", "\t") if sign in first and "," not in first), ",")


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
