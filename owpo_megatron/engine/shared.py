"""One server for many runs or evaluations in turn: weights are sent to it, so that only its shape has to fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from owpo_megatron.config import Config, hf_folder
from owpo_megatron.engine.server import Server


class SharedEngine:
    """A server, started when it is first asked for and restarted for another model or other settings."""

    def __init__(self, log: Path):
        self._log = log
        self._server: Server | None = None
        self._serves: tuple[Any, ...] = ()

    def url(self, config: Config) -> str:
        """Return the URL of a running server that fits the run."""
        files = hf_folder(config.model.path)
        shape = (files / "config.json").read_text()
        wanted = (shape, config.model.dtype, config.engine.model_dump_json(), json.dumps(config.sglang, sort_keys=True))
        if self._server is None or wanted != self._serves or not self._server.is_running():
            self.close()
            raw = {"load_format": "dummy"} | config.sglang
            self._server = Server(config.engine, files, config.model.dtype, raw, self._log)
            self._server.start()
            self._serves = wanted
        return self._server.client.url

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
