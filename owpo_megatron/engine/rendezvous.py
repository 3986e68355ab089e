"""How a run finds engines that somebody else starts: each announces itself by a file in a folder that both can see.

    RUN/rendezvous/4711.0/engine_0.json      {"url": "http://node7:21844", "key": "...", "host": "node7", "pid": 812}
    RUN/rendezvous/4711.0/engine_1.json      {"failed": "SGLang ended with status 1 before it answered"}

The folder belongs to one attempt of one job (`owpo launch` names it JOB.ATTEMPT), so an address of an earlier attempt
is never found. The files are readable by their owner alone: whoever has the key can load weights into the engine.
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
from owpo_megatron.errors import EngineError

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Announcement:
    """Where an engine answers.

    Example:
        Announcement(url="http://node7:21844", key="9f2c...", host="node7", pid=812)
    """

    url: str
    key: str  # goes as `Authorization: Bearer KEY` with every request
    host: str  # for a reader; the url is what counts
    pid: int
    mirror: str | None = None  # where it takes changes of its weights (sync/delta/replica.py), by the same key


def announce(folder: Path, index: int, announcement: Announcement) -> None:
    """Write engine `index`'s file; it appears whole or not at all."""
    _write(_file(folder, index), asdict(announcement))


def announce_failure(folder: Path, index: int, reason: str) -> None:
    """Let whoever waits for engine `index` know at once that it will not come."""
    _write(_file(folder, index), {"failed": reason})


def withdraw(folder: Path, index: int) -> None:
    """Take engine `index`'s file away: it has ended."""
    _file(folder, index).unlink(missing_ok=True)


class AnnouncedEngine:
    """A server that somebody else runs and may start again, elsewhere: lost, its next announcement is waited for."""

    def __init__(self, folder: Path, index: int, config: EngineConfig):
        self._folder, self._index, self._patience = folder, index, config.startup_timeout
        self.client = EngineClient("http://not-announced", config.request_timeout)

    def connect(self, deadline: float) -> None:
        """Return when it has announced itself and answers.

        Raises:
            EngineError: it failed to start, or did not come until `deadline` (of time.monotonic).
        """
        said = f"did not announce itself in {self._folder}"
        while True:
            found = read(self._folder, self._index)
            if found is not None:
                self.client.connect(found.url, found.key, found.mirror)
                try:
                    self.client.model_info(timeout=5.0)
                    return
                except EngineError as error:  # an announcement that outlived its engine
                    said = str(error)
            if time.monotonic() > deadline:
                waited = f"engine.startup_timeout = {self._patience:g} s"
                raise EngineError(f"engine {self._index} is not there after {waited}: {said}")
            time.sleep(POLL_SECONDS)

    def restart(self) -> None:
        self.connect(time.monotonic() + self._patience)

    def stop(self) -> None:
        pass  # not ours; its connections are given up by their time-outs

    def close(self) -> None:
        self.client.close()


def announced_engines(folder: Path, config: EngineConfig) -> list[AnnouncedEngine]:
    """Engines 0 .. config.announced - 1, once all of them answer. Raises EngineError when one does not come."""
    deadline = time.monotonic() + config.startup_timeout
    engines = [AnnouncedEngine(folder, index, config) for index in range(config.announced)]
    for engine in engines:
        engine.connect(deadline)
    return engines


def read(folder: Path, index: int) -> Announcement | None:
    """Engine `index`'s announcement, None while there is none. Raises EngineError when it said that it failed."""
    try:
        content = json.loads(_file(folder, index).read_text())
    except FileNotFoundError:
        return None
    if "failed" in content:
        raise EngineError(f"engine {index} did not start: {content['failed']}")
    return Announcement(**content)


def write_private(file: Path, text: str) -> None:
    """Write a file that its owner alone may read."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)  # one that exists would keep its mode
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
        opened.write(text)


def _file(folder: Path, index: int) -> Path:
    return folder / f"engine_{index}.json"


def _write(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_suffix(f".{os.getpid()}")
    write_private(partial, json.dumps(content))
    partial.rename(file)
