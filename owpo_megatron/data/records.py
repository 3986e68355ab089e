"""From the lines of a file to problems: two record schemas, and messages that name the line.

Ours: `{problem, answer}` with optional `id` and `domain`; other fields are ignored. `messages: [{role, content}]` may
stand for `problem`. DAPO-Math-17k's:
`{prompt: [{role, content}], reward_model: {ground_truth}, extra_info: {index}}`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from owpo_megatron.data.problem import Problem
from owpo_megatron.errors import UserError

DEFAULT_DOMAIN = "math"  # of a record in a file that does not say


def jsonl_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of every line that is not empty."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                yield place, json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                shown = line.decode(errors="replace").strip()
                raise UserError(place, short(shown), f"is not JSON ({error}); one JSON object a line") from error


def parquet_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, record) of every row; only the columns that a problem needs are read, some thousand rows at a time."""
    import pyarrow
    import pyarrow.parquet

    columns = {"id", "problem", "messages", "answer", "domain", "prompt", "reward_model", "extra_info"}
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        known = [name for name in file.schema_arrow.names if name in columns]
        for batch in file.iter_batches(batch_size=4096, columns=known):
            for record in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError("data.source", path, f"cannot be read as Parquet: {short(str(error))}") from error


def problem_of(record: Any, place: str, index: int) -> Problem:
    """The problem of a record.

    Raises:
        UserError: a field is missing or of the wrong kind; `place` (file:line) is named.
    """
    if not isinstance(record, dict):
        raise UserError(place, short(record), "must be an object with `problem` and `answer`")
    domain = record.get("domain") or DEFAULT_DOMAIN
    if "prompt" in record and "problem" not in record:
        text = _prompt_text(record["prompt"], place, "prompt")
        answer = _field(record.get("reward_model"), "ground_truth", place, "reward_model.ground_truth")
        extra = record.get("extra_info")
        name = extra.get("index") if isinstance(extra, dict) else None
    else:
        if "messages" in record and "problem" not in record:
            text = _prompt_text(record["messages"], place, "messages")
        else:
            text = _text(_field(record, "problem", place), place, "problem")
        answer = _field(record, "answer", place)
        name = record.get("id")
    if isinstance(answer, int) and not isinstance(answer, bool):
        answer = str(answer)
    return Problem(
        id=str(index if name is None else name),
        text=text,
        answer=_text(answer, place, "answer"),
        domain=_text(domain, place, "domain"),
    )


def _prompt_text(messages: Any, place: str, name: str) -> str:
    """The one user message; the template of the run makes the dialogue, so a record's own system turn has no place."""
    is_dialogue = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    if not is_dialogue or [message.get("role") for message in messages] != ["user"]:
        raise UserError(f"{place} {name}", short(messages), "must be a list of one {role: user, content: text}")
    return _text(messages[0].get("content"), place, f"{name}[0].content")


def _field(record: Any, name: str, place: str, shown_name: str | None = None) -> Any:
    shown_name = shown_name or name
    if not isinstance(record, dict) or name not in record:
        raise UserError(place, short(record), f"lacks `{shown_name}`; add it (docs/data.md)")
    return record[name]


def _text(value: Any, place: str, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place} {name}", short(value), "must be a text that is not empty")
    return value


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
