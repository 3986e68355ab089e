"""Samples dealt to engines. Not covered: engines that differ in speed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from owpo_megatron.engine.generation import Generation
from owpo_megatron.types import Prompt, Rollout, SampleRequest, Sampling


class Client:
    """An engine that answers when all engines together have been asked for `wanted` samples."""

    incarnation = 0

    def __init__(self, asked: list[int], index: int, wanted: int, full: threading.Event):
        self._asked, self._index, self._wanted, self._full = asked, index, wanted, full
        self._lock = threading.Lock()

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling, version: int | None) -> list[Rollout]:
        with self._lock:
            self._asked[self._index] += len(requests)
        if sum(self._asked) >= self._wanted:
            self._full.set()
        assert self._full.wait(10), "samples wait although engines have room"
        return [Rollout(one.prompt, (1,), (-0.5,), 0, "stop", one.seed) for one in requests]


@pytest.mark.parametrize(("samples", "per_post", "dealt"), [(8, 1, [2, 2, 2, 2]), (12, 2, [4, 4, 2, 2])])
def test_every_engine_begins_with_its_share(samples: int, per_post: int, dealt: list[int]) -> None:
    """There is room for all samples at the first engine, which would leave the others idle."""
    asked, full = [0] * 4, threading.Event()
    clients: list[Any] = [Client(asked, index, samples, full) for index in range(4)]
    requests = [SampleRequest(Prompt(str(index), (1,), "", ""), index) for index in range(samples)]
    found = Generation(
        clients, requests, Sampling(4), samples_per_post=per_post, concurrency=64, give_up=lambda engine: None,
        bring_back=lambda engine, error: None,
    ).run()  # fmt: skip
    assert [rollout.seed for rollout in found] == list(range(samples))
    assert sorted(asked, reverse=True) == dealt
