"""A warm engine: `owpo serve -c FILE --warm` keeps it, and the runs of FILE on this machine use it in turn.

    runs/.engines/1f0c2a.../engine_0.json    its announcement, while it answers
    runs/.engines/1f0c2a.../lock             held by the run that uses it

The folder's name is a digest of everything the server was started with, so that a run finds the engine only where it
would start the same one itself. Its weights do not matter: every run pushes its own before it generates.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine.command import environment, find_python, server_arguments
from owpo_megatron.engine.rendezvous import AnnouncedEngine, Announcement, read
from owpo_megatron.errors import EngineError
from owpo_megatron.run.files import take_lock

ADDRESS = {"host", "port"}  # may differ between two servers that do the same


def warm_folder(
    runs_dir: Path,
    config: EngineConfig,
    model_files: Path,
    dtype: str,
    raw: Mapping[str, Any],
    variables: Mapping[str, str] = {},
) -> Path:
    """Return the folder in which a server with these arguments announces itself.

    Args:
        runs_dir: folder of the runs that may use it.
        raw: arguments of the `sglang` section, and what other sections ask of the server.
        variables: environment variables of the server, besides this process's.
    """
    arguments = server_arguments(config, model_files, dtype, raw)
    known = {name: value for name, value in arguments.items() if name not in ADDRESS}
    threads = environment(config, model_files).get("OMP_NUM_THREADS")
    serves = [str(find_python(config)), (model_files / "config.json").read_text(), known, threads, dict(variables)]
    digest = hashlib.sha256(json.dumps(serves, sort_keys=True, default=str).encode()).hexdigest()
    return runs_dir.absolute() / ".engines" / digest[:16]


class WarmEngine(AnnouncedEngine):
    """The engine that `owpo serve` keeps, held by one run until `close`."""

    def __init__(self, folder: Path, config: EngineConfig, lock: int):
        super().__init__(folder, 0, config)
        self.client.shares_memory = True  # it is on this machine
        self._lock = lock

    def close(self) -> None:
        super().close()
        os.close(self._lock)


def take_warm_engine(folder: Path, config: EngineConfig) -> WarmEngine | None:
    """Return the engine that is warm in `folder`; None without one, or where it is in use or does not answer."""
    found = _announced(folder)
    if found is None:
        return None
    lock = take_lock(folder / "lock")
    if lock is None:
        return None
    engine = WarmEngine(folder, config, lock)
    engine.client.connect(found.url, found.key, found.mirror)
    try:
        engine.client.model_info(timeout=5.0)
    except EngineError:
        engine.close()
        return None
    return engine


def warm_process(folder: Path) -> int | None:
    """Return the process that keeps an engine warm in `folder`, None where there is none."""
    found = _announced(folder)
    return None if found is None else found.pid


def _announced(folder: Path) -> Announcement | None:
    """The announcement of a process of this machine that still runs."""
    try:
        found = read(folder, 0)
        if found is None or found.host != socket.gethostname():
            return None
        os.kill(found.pid, 0)
    except (EngineError, ProcessLookupError):  # its last start failed, or it was killed
        return None
    return found
