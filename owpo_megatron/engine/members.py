"""A server of a fleet: what every one must offer, and the one that others started."""

from __future__ import annotations

import time
from typing import Protocol

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine.client import EngineClient, EngineGone


class Engine(Protocol):
    """A server of the fleet."""

    client: EngineClient

    def restart(self) -> None:
        """Bring the server back; raises EngineError on failure."""

    def stop(self) -> None:
        """Make its pending requests fail quickly."""

    def abort(self) -> None:
        """End it with the stacks of its threads in its log, where it is a process of the run's own."""

    def close(self) -> None: ...


class ForeignEngine:
    """A server that is no process of this run's: nothing here ends it."""

    client: EngineClient

    def stop(self) -> None:
        pass  # its connections end by their time-outs

    def abort(self) -> None:
        pass

    def close(self) -> None:
        self.client.close()


class UrlEngine(ForeignEngine):
    """A server started by others. If it is lost, wait until they restart it, then send the weights again."""

    def __init__(self, url: str, config: EngineConfig):
        self.client = EngineClient(url, config.request_timeout)
        self._patience = config.startup_timeout

    def restart(self) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            time.sleep(0.5)  # sleep first: a server about to exit may still answer
            try:
                self.client.model_info(timeout=5.0)
                break
            except EngineGone:
                if time.monotonic() > deadline:
                    raise
        self.client.connect(self.client.url)
