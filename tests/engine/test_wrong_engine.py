"""An engine that answers wrongly, and goes on to answer: it draws nothing more until it has been brought back."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from blocking_sampler import BlockingSampler

from owpo_megatron.engine.client import EngineGone
from owpo_megatron.engine.generation import Generation
from owpo_megatron.types import Prompt, Rollout, SampleRequest, Sampling


class Client(BlockingSampler):
    """Wrong in its first call; the others end once that is known."""

    def __init__(self, events: list[str], is_wrong: bool, known: threading.Event):
        self.url, self.incarnation = "http://e", 0
        self._events, self._is_wrong, self._known, self._lock = events, is_wrong, known, threading.Lock()

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling, version: int | None) -> list[Rollout]:
        with self._lock:
            is_wrong, self._is_wrong = self._is_wrong, False
            self._events.append("wrong" if is_wrong else "drawn by " + str(self.incarnation))
        if is_wrong:
            raise EngineGone(self.url, " answered nonsense")
        assert self._known.wait(10)
        return [Rollout(one.prompt, (1,), (-0.5,), 0, "stop", one.seed) for one in requests]


@pytest.mark.parametrize("engines", [1, 2])
def test_it_is_brought_back_before_it_draws_again(engines: int) -> None:
    """Bring it back with a second engine, too, which could draw all that is left."""
    known, calls = threading.Event(), [list[str]() for _ in range(engines)]
    clients: list[Any] = [Client(calls[index], index == 0, known) for index in range(engines)]

    def bring_back(engine: int, error: EngineGone) -> None:
        calls[engine].append("brought back")
        clients[engine].incarnation += 1

    requests = [SampleRequest(Prompt(str(index), (1,), "", ""), index) for index in range(12)]
    found = Generation(
        clients, requests, Sampling(4), samples_per_post=1, concurrency=2, give_up=lambda engine: known.set(),
        bring_back=bring_back,
    ).run()  # fmt: skip
    assert [rollout.seed for rollout in found] == list(range(12))
    assert calls[0].count("wrong") == calls[0].count("brought back") == 1
    assert calls[0].count("drawn by 0") <= 1, "the other lane's post was under way; it takes no further one"
