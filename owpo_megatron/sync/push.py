"""Sequence of one weight sync, the same for every transport.

    pause (requests in flight are kept) -> flush caches -> unset version -> buckets -> set new version -> resume

An engine whose update fails stays paused: it holds neither the old nor the new weights and must not generate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import torch

from owpo_megatron.engine.answers import UNKNOWN_VERSION
from owpo_megatron.errors import EngineError
from owpo_megatron.sync.bucket import Bucket, in_buckets

Result = TypeVar("Result")
Weights = Iterable[tuple[str, torch.Tensor]]


class WeightEngine(Protocol):
    """Engine operations that a sync needs; every method raises EngineError when the engine refuses or is gone."""

    url: str
    key: str | None
    incarnation: int  # grows when the engine is restarted
    shares_memory: (
        bool  # runs on this machine and in the same namespaces, so that it can open our shared memory by name
    )
    mirror: str | None  # URL of the program that keeps a copy of its weights; see delta/replica.py

    @property
    def tp_size(self) -> int: ...

    @property
    def quantization(self) -> str | None: ...

    def mark(self, name: str) -> None: ...
    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def flush(self) -> None: ...
    def begin_update(self) -> None: ...
    def end_update(self) -> None: ...
    def set_version(self, version: int) -> None: ...
    def weight_version(self) -> int: ...
    def checksums(self) -> list[dict[str, str]]: ...
    def update_from_tensor(self, payloads: Sequence[bytes]) -> None: ...
    def update_from_bucket(self, payloads: Sequence[bytes]) -> None: ...
    def update_from_disk(self, path: str) -> None: ...
    def call_mirror(self, what: str, body: dict[str, Any]) -> dict[str, Any]: ...
    def update_from_distributed(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group_name: str
    ) -> None: ...
    def join_group(
        self, host: str, port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None: ...
    def leave_group(self, group_name: str) -> None: ...


class Transport(Protocol):
    """Moves weights to paused engines."""

    max_bucket_bytes: int | None  # None: no limit besides the configured bucket size

    def session(
        self, engines: Sequence[WeightEngine], version: int
    ) -> AbstractContextManager[Callable[[Bucket], None]]:
        """Yield a function that sends one bucket; the bucket's tensors may be reused when it returns.

        When the context exits normally, every engine has loaded all weights; after an error, nothing is in flight any
        more. Raises EngineError, at the failing bucket or later.
        """

    def close(self) -> None: ...


class UpdateRequests(ABC):
    """A transport whose buckets are requests to the engines between begin and end of an update.

    Any rank can send them, one rank at a time: see senders.py.
    """

    max_bucket_bytes: int | None

    @contextmanager
    def session(self, engines: Sequence[WeightEngine], version: int) -> Iterator[Callable[[Bucket], None]]:
        with updating(engines), self.sending(engines) as send:
            yield send

    @abstractmethod
    def sending(self, engines: Sequence[WeightEngine]) -> AbstractContextManager[Callable[[Bucket], None]]:
        """The same inside of an update that is open."""

    @abstractmethod
    def close(self) -> None: ...


@contextmanager
def updating(engines: Sequence[WeightEngine]) -> Iterator[None]:
    """An update of the engines; an error leaves it open, and the next one begins by closing it."""
    on_all(engines, lambda engine: engine.begin_update())
    yield
    on_all(engines, lambda engine: engine.end_update())


class Senders(Protocol):
    """Other ranks that have a part of the weights each, and can send it (senders.py)."""

    def reach(self, engines: Sequence[WeightEngine]) -> bool:
        """Whether every one of them reaches every engine."""

    def push(self, engines: Sequence[WeightEngine]) -> None:
        """Send all parts; raises EngineError, and RunError where a rank has ended."""

    def close(self) -> None: ...


class Check(Protocol):
    """Compares the weights that engines hold with those that were sent."""

    def follow(self, weights: Weights) -> Weights:
        """Record each pair and yield it unchanged."""

    def check(self) -> None:
        """Query every engine; raises EngineError when one holds other weights."""


class EngineSync:
    """Implements WeightSync for the rank that drives the engines (global rank 0); other ranks only iterate the weights.

    Args:
        engines: engines to update; none for a replay, which still iterates the weights, since that is collective.
        bucket_bytes: maximum size of a bucket; the transport may lower it. A larger tensor gets a bucket of its own.
            Three buckets are in memory at a time: one gathered, one packed, one in flight.
        transform: applied to the stream of weights before sending (quantisation).
        check: records the stream and queries the engines afterwards.
        senders: send the weights where they are; None: this rank sends them all.
    """

    def __init__(
        self,
        transport: Transport,
        engines: Sequence[WeightEngine],
        bucket_bytes: int,
        transform: Callable[[Weights], Weights] | None = None,
        check: Check | None = None,
        senders: Senders | None = None,
    ):
        self._transport = transport
        self._transform = transform
        self._check = check
        self._senders = senders
        self._engines = list(engines)
        self._bucket_bytes = min(bucket_bytes, transport.max_bucket_bytes or bucket_bytes)

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Send (HF name, full tensor) pairs to every engine; return when all report `version`.

        Raises:
            EngineError: an engine refused, is gone, or holds other weights than it was sent. The engines stay paused
                and without a version; the next push starts from the beginning.
            RunError: a rank that sends weights has ended.
        """
        engines = self._engines
        if engines and self._transform:
            weights = self._transform(weights)
        if engines and self._check:
            weights = self._check.follow(weights)
        if not engines:
            deque(weights, maxlen=0)
            return
        on_all(engines, lambda engine: engine.pause())
        on_all(engines, lambda engine: engine.flush())
        # no version until all weights are loaded: a half-updated engine can never pass for one with the old weights
        on_all(engines, lambda engine: engine.set_version(UNKNOWN_VERSION))
        if self._senders is not None and self._senders.reach(engines):
            with updating(engines):
                self._senders.push(engines)
            if self._check:
                deque(weights, maxlen=0)  # hashes them on another way than they went
        else:
            with one_thread(), self._transport.session(engines, version) as send:
                for bucket in in_buckets(weights, self._bucket_bytes):
                    send(bucket)
        if self._check:
            self._check.check()
        on_all(engines, lambda engine: engine.set_version(version))
        on_all(engines, lambda engine: engine.resume())
        reported = on_all(engines, lambda engine: engine.weight_version())
        for engine, got in zip(engines, reported, strict=True):
            if got != version:
                raise EngineError(f"engine {engine.url} reports weight version {got} after a push of version {version}")

    def close(self) -> None:
        self._transport.close()
        if self._senders is not None:
            self._senders.close()


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's host copies on one thread for the duration of a push.

    Copies of weights are short, and OpenMP's threads wait for each other after every copy. A paused engine keeps one
    core busy (SGLang polls for requests), so a team of all cores would wait for a time slice at each of hundreds of
    tensors.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def on_all(engines: Sequence[WeightEngine], call: Callable[[WeightEngine], Result]) -> list[Result]:
    """Call for every engine concurrently; return results in order, raise the first error once all have ended."""
    if len(engines) == 1:
        return [call(engines[0])]
    with ThreadPoolExecutor(len(engines)) as pool:
        return list(pool.map(call, engines))
