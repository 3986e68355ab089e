"""The sequence of a sync, its buckets and its payloads; no server (test_transports.py has one)."""

from __future__ import annotations

import base64
import pickle
from pathlib import Path

import pytest
import torch

from owpo_megatron.config import SyncConfig
from owpo_megatron.errors import EngineError
from owpo_megatron.sync import EngineSync, make_sync
from owpo_megatron.sync.distributed import address_seen_from
from owpo_megatron.sync.push import Bucket, in_buckets
from owpo_megatron.sync.tensor import serialize


class RecordingEngine:
    """Notes what it is asked to do; can refuse one thing or report another version."""

    incarnation = 0
    tp_size = 1

    def __init__(self, calls: list[str], url: str = "http://e", refuses: str = "", reports: int | None = None):
        self.calls, self.url, self.refuses, self.reports = calls, url, refuses, reports
        self.version = -1

    def _call(self, name: str) -> None:
        if name == self.refuses:
            raise EngineError(f"{self.url} refuses {name}")
        self.calls.append(name)

    def pause(self) -> None:
        self._call("pause")

    def resume(self) -> None:
        self._call("resume")

    def flush(self) -> None:
        self._call("flush")

    def begin_update(self) -> None:
        self._call("begin")

    def end_update(self) -> None:
        self._call("end")

    def update_from_tensor(self, payload: str) -> None:
        self._call("tensor")

    def set_version(self, version: int) -> None:
        self._call(f"version {version}")
        self.version = version

    def weight_version(self) -> int:
        return self.version if self.reports is None else self.reports


WEIGHTS = [("a", torch.zeros(10)), ("b", torch.zeros(300)), ("c", torch.zeros(5)), ("d", torch.zeros(6))]


def test_sequence_of_a_push() -> None:
    calls: list[str] = []
    sync = make_sync(SyncConfig(), [RecordingEngine(calls)], Path("unused"))  # type: ignore[list-item]
    sync.push(WEIGHTS, 4)
    assert calls == ["pause", "flush", "begin", "tensor", "end", "version 4", "resume"]


def test_a_failed_update_leaves_the_engine_paused_and_unversioned() -> None:
    calls: list[str] = []
    sync = make_sync(SyncConfig(), [RecordingEngine(calls, refuses="tensor")], Path("unused"))  # type: ignore[list-item]
    with pytest.raises(EngineError, match="refuses tensor"):
        sync.push(WEIGHTS, 4)
    assert calls == ["pause", "flush", "begin"]


def test_an_engine_that_reports_another_version_is_named() -> None:
    engines = [RecordingEngine([]), RecordingEngine([], url="http://f", reports=3)]
    with pytest.raises(EngineError, match="http://f reports weight version 3 after a push of version 4"):
        make_sync(SyncConfig(), engines, Path("unused")).push(WEIGHTS, 4)  # type: ignore[arg-type]


def test_without_engines_the_weights_are_still_iterated() -> None:
    """Iterating gathers over trainer ranks: a replay's rank 0 must take part in it."""
    weights = iter(WEIGHTS)
    make_sync(SyncConfig(), [], Path("unused")).push(weights, 4)
    assert next(weights, None) is None


def test_buckets_respect_their_size() -> None:
    names = [[name for name, _ in bucket] for bucket in in_buckets(WEIGHTS, 64)]
    assert names == [["a"], ["b"], ["c", "d"]]
    assert [[name for name, _ in bucket] for bucket in in_buckets(WEIGHTS, 1 << 20)] == [["a", "b", "c", "d"]]


def test_push_streams_its_weights() -> None:
    """When a bucket is sent, at most one tensor beyond it has been produced."""
    produced, ahead = 0, []

    def weights():
        nonlocal produced
        for index in range(20):
            produced += 1
            yield f"w{index}", torch.zeros(16)

    class Counting:
        sent = 0

        def begin(self, engines: object, version: int) -> None: ...

        def send(self, engines: object, bucket: Bucket) -> None:
            self.sent += len(bucket)
            ahead.append(produced - self.sent)

        def end(self, engines: object) -> None: ...

        def close(self) -> None: ...

    EngineSync(Counting(), [RecordingEngine([])], bucket_bytes=192).push(weights(), 1)  # type: ignore[list-item]
    assert len(ahead) == 7 and max(ahead) == 1


def test_payload_holds_the_values_and_nothing_else() -> None:
    """A view of a large buffer, as the policy's parameters are, must not drag the buffer along."""
    buffer = torch.arange(1_000_000.0)
    bucket = [("view", buffer[10:16].view(2, 3)), ("transposed", torch.arange(6.0).view(2, 3).T)]
    payload = serialize([*bucket, ("half", torch.ones(2, dtype=torch.bfloat16))])
    assert len(payload) < 10_000
    got = pickle.loads(base64.b64decode(payload))
    assert [name for name, _ in got] == ["view", "transposed", "half"]
    assert torch.equal(got[0][1], torch.arange(10.0, 16.0).view(2, 3))
    assert torch.equal(got[1][1], torch.arange(6.0).view(2, 3).T)
    assert got[2][1].dtype == torch.bfloat16


def test_address_that_a_local_engine_sees() -> None:
    assert address_seen_from("http://127.0.0.1:30000") == "127.0.0.1"
