"""Samples dealt to engines, and cut there. Not covered: engines that differ in speed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from blocking_sampler import BlockingSampler

from owpo_megatron.engine.client import EngineGone
from owpo_megatron.engine.generation import Generation
from owpo_megatron.types import FinishReason, Prompt, Rollout, SampleRequest, Sampling


class Client(BlockingSampler):
    """An engine that answers when all engines together have been asked for `wanted` samples."""

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


class CuttingClient(BlockingSampler):
    """Answers even seeds at once, and the others when they are cut: with one token, or as an engine that is gone."""

    def __init__(self, gone: bool):
        self._gone = gone
        self.calls: list[str] = []
        self._cut: dict[str, threading.Event] = {}

    def generate(
        self, requests: Sequence[SampleRequest], sampling: Sampling, version: int | None, names: Sequence[str]
    ) -> list[Rollout]:
        (request,), (name,) = requests, names
        reason: FinishReason = "stop"
        if request.seed % 2:
            reason = "abort"
            assert self._cut.setdefault(name, threading.Event()).wait(10), "nobody cuts it"
            if self._gone:
                raise EngineGone("http://engine", " is gone")
        return [Rollout(request.prompt, (1,), (-0.5,), 0, reason, request.seed)]

    def cut(self, name: str) -> None:
        self.calls.append(name)
        if self.calls.count(name) == 2 or self._gone:  # the first came before the sample itself
            self._cut.setdefault(name, threading.Event()).set()


@pytest.mark.parametrize("gone", [False, True])
def test_what_is_in_flight_is_cut_and_what_waits_is_not_begun(gone: bool) -> None:
    """Three of ten samples are enough; there is room for eight. Each is named once, and finished once."""
    client: Any = CuttingClient(gone)
    complete: list[int] = []
    told: list[int] = []
    brought_back: list[int] = []

    def finished(first: int, rollouts: Sequence[Rollout]) -> None:
        told.extend(range(first, first + len(rollouts)))
        complete.extend(one.seed for one in rollouts if one.finish_reason == "stop")

    requests = [
        SampleRequest(Prompt(str(index), (1,), "", ""), seed) for index, seed in enumerate([0, 1, 2, 3, 4, *[5] * 5])
    ]
    found = Generation(
        [client], requests, Sampling(4), samples_per_post=1, concurrency=8, give_up=lambda engine: None,
        bring_back=lambda engine, error: brought_back.append(engine), finished=finished,
        enough=lambda: len(complete) == 3,
    ).run()  # fmt: skip
    assert [rollout.finish_reason for rollout in found] == ["stop", "abort"] * 2 + ["stop"] + ["abort"] * 5
    assert [len(rollout.response_ids) for rollout in found[:4]] == [1, 0, 1, 0] if gone else [1, 1, 1, 1]
    assert sorted(told) == list(range(10)) and sorted(complete) == [0, 2, 4]
    assert brought_back == ([0] if gone else [])
    names = set(client.calls)
    assert not any(one != other and one.startswith(other) for one in names for other in names)
