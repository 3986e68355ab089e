"""Full-text search over a local JSONL, by the index that SQLite has built in (FTS5, ranked by BM25)."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from owpo_megatron.environments.tools import ToolEnvironment, ToolError
from owpo_megatron.environments.worker import shortened
from owpo_megatron.errors import UserError

_WORD = re.compile(r"\w+")
MAX_WORDS = 32  # of a query


class Search(ToolEnvironment):
    """Shows the best passages for a query.

    The index lies beside the documents, NAME.fts.sqlite, and is made again when they change.

    Args:
        documents: a .jsonl file; every line has a text, and may have a title.
        text, title: the fields with these names.
        passages: how many are shown.
        characters: shown of each passage.

    Raises:
        UserError: no such file, or a line without a text.
    """

    name = "search"
    description = "Finds passages in a collection of documents by their words."
    parameters: Mapping[str, str] = {"query": "words to look for"}

    def __init__(
        self,
        documents: str,
        text: str = "text",
        title: str = "title",
        passages: int = 3,
        characters: int = 1500,
        instruction: str | None = None,
    ):
        super().__init__(instruction)
        self._passages, self._characters = passages, characters
        index = index_of(Path(documents), text, title)
        self._database = sqlite3.connect(f"file:{index.absolute()}?mode=ro", uri=True)

    def call(self, arguments: Mapping[str, str]) -> str:
        words = _WORD.findall(arguments["query"])[:MAX_WORDS]
        if not words:
            raise ToolError("the query has no word")
        query = " OR ".join(f'"{word}"' for word in words)  # quoted: no word is an operator of FTS
        rows = self._database.execute(
            "select title, text from passages where passages match ? order by rank, rowid limit ?",
            (query, self._passages),
        ).fetchall()
        if not rows:
            return "(nothing found)"
        return "\n\n".join(
            f"[{place}] {title + ': ' if title else ''}{shortened(text, self._characters)}"
            for place, (title, text) in enumerate(rows, 1)
        )


def index_of(documents: Path, text: str, title: str) -> Path:
    """The index of the documents, made unless it is there."""
    try:
        facts = documents.stat()
    except OSError as error:
        raise UserError("environment.args.documents", documents, f"{error.strerror}; name a .jsonl file") from error
    mark = f"1/{facts.st_size}/{facts.st_mtime_ns}/{text}/{title}"
    index = documents.with_name(documents.name + ".fts.sqlite")
    if _mark(index) != mark:
        _write(index, _rows(documents, text, title), mark)
    return index


def _mark(index: Path) -> str | None:
    """The mark of what the index was made of; None: there is no index."""
    if not index.is_file():
        return None
    try:
        with sqlite3.connect(f"file:{index.absolute()}?mode=ro", uri=True) as database:
            return str(database.execute("select mark from made_of").fetchone()[0])
    except sqlite3.Error:
        return None


def _write(index: Path, rows: Iterator[tuple[str, str]], mark: str) -> None:
    """Make the index in a file of its own, which takes its place when it is complete."""
    descriptor, draft = tempfile.mkstemp(dir=index.parent, prefix=index.name)
    os.close(descriptor)
    try:
        database = sqlite3.connect(draft)
        with database:
            database.execute("create virtual table passages using fts5(title, text, tokenize='porter unicode61')")
            database.execute("create table made_of (mark text)")
            database.executemany("insert into passages (title, text) values (?, ?)", rows)
            database.execute("insert into made_of values (?)", (mark,))
        database.close()
        os.replace(draft, index)
    finally:
        Path(draft).unlink(missing_ok=True)


def _rows(documents: Path, text: str, title: str) -> Iterator[tuple[str, str]]:
    with open(documents, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
                yield str(found.get(title, "")), str(found[text])
            except (ValueError, KeyError, AttributeError) as error:
                remedy = f"is no object with the field {text!r} ({error})"
                raise UserError(f"{documents}:{number}", line[:60].strip(), remedy) from error
