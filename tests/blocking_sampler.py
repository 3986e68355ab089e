"""Engines for tests of how samples are dealt: a sampler whose answers are made by a call that may wait."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

from owpo_megatron.types import Rollout


class BlockingSampler:
    """Answers by its `generate`, each request in a thread of its own."""

    url, incarnation = "http://engine", 0

    def generate(self, *given: Any, **named: Any) -> list[Rollout]:
        raise NotImplementedError

    def submit(self, *given: Any, **named: Any) -> Future[list[Rollout]]:
        future: Future[list[Rollout]] = Future()

        def answer() -> None:
            try:
                rollouts = self.generate(*given, **named)
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(rollouts)

        threading.Thread(target=answer, daemon=True).start()
        return future

    def cut(self, name: str) -> None:
        raise NotImplementedError
