"""Discovery of engines started by others: each announces itself by a file in a folder that both can see.

    RUN/rendezvous/4711.0/engine_0.json      {"url": "http://node7:21844", "key": "...", "host": "node7", "pid": 812}
    RUN/rendezvous/4711.0/engine_1.json      {"failed": "SGLang exited with status 1 before it answered"}

The folder belongs to one attempt of one job (`owpo launch` names it JOB.ATTEMPT), so addresses of an earlier attempt
are never found. Only their owner can read the files: whoever has the key can load weights into the engine.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine.client import EngineClient
from owpo_megatron.engine.members import ForeignEngine
from owpo_megatron.errors import EngineError

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Announcement:
    """Address and key of a running engine.

    Example:
        Announcement(url="http://node7:21844", key="9f2c...", host="node7", pid=812)
    """

    url: str
    key: str  # sent as `Authorization: Bearer KEY` with every request
    host: str  # for human readers; connections use the url
    pid: int
    mirror: str | None = None  # URL that accepts changes of its weights (sync/delta/replica.py), with the same key


def announce(folder: Path, index: int, announcement: Announcement) -> None:
    """Write engine `index`'s file atomically."""
    _write(_file(folder, index), asdict(announcement))


def announce_failure(folder: Path, index: int, reason: str) -> None:
    """Notify those waiting for engine `index` that it failed to start."""
    _write(_file(folder, index), {"failed": reason})


def withdraw(folder: Path, index: int) -> None:
    """Remove engine `index`'s file after it has exited."""
    _file(folder, index).unlink(missing_ok=True)


class AnnouncedEngine(ForeignEngine):
    """A server started by others, perhaps elsewhere after a restart. If lost, wait for its next announcement."""

    def __init__(self, folder: Path, index: int, config: EngineConfig):
        self._folder, self._index, self._patience = folder, index, config.startup_timeout
        self.client = EngineClient("http://not-announced", config.request_timeout)

    def connect(self, deadline: float) -> None:
        """Wait until it has announced itself and answers.

        Raises:
            EngineError: it failed to start, or was not there by `deadline` (of time.monotonic).
        """
        reason = f"did not announce itself in {self._folder}"
        while True:
            found = read(self._folder, self._index)
            if found is not None:
                self.client.connect(found.url, found.key, found.mirror)
                try:
                    self.client.model_info(timeout=5.0)
                    return
                except EngineError as error:  # the announcement outlived its engine
                    reason = str(error)
            if time.monotonic() > deadline:
                waited = f"engine.startup_timeout = {self._patience:g} s"
                raise EngineError(f"engine {self._index} is not there after {waited}: {reason}")
            time.sleep(POLL_SECONDS)

    def restart(self) -> None:
        self.connect(time.monotonic() + self._patience)


def announced_engines(folder: Path, config: EngineConfig) -> list[AnnouncedEngine]:
    """Return engines 0 .. config.announced - 1 once all of them answer. Raises EngineError if one does not."""
    deadline = time.monotonic() + config.startup_timeout
    engines = [AnnouncedEngine(folder, index, config) for index in range(config.announced)]
    for engine in engines:
        engine.connect(deadline)
    return engines


def read(folder: Path, index: int) -> Announcement | None:
    """Return engine `index`'s announcement, None while there is none. Raises EngineError if it failed to start."""
    try:
        content = json.loads(_file(folder, index).read_text())
    except FileNotFoundError:
        return None
    if "failed" in content:
        raise EngineError(f"engine {index} did not start: {content['failed']}")
    return Announcement(**content)


def write_private(file: Path, text: str) -> None:
    """Write a file readable by its owner alone."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # an existing file would keep its mode
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(text)


def _file(folder: Path, index: int) -> Path:
    return folder / f"engine_{index}.json"


def _write(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_suffix(f".{os.getpid()}")
    write_private(partial, json.dumps(content))
    partial.rename(file)
