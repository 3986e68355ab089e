"""The sequence of one weight sync, whatever carries the weights.

    pause (requests in flight are kept) -> flush the caches -> no version -> buckets -> the new version -> resume

An engine whose update fails stays paused: it has neither the old weights nor the new ones, and must not generate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import torch

from owpo_megatron.engine.client import UNKNOWN_VERSION
from owpo_megatron.errors import EngineError
from owpo_megatron.sync.bucket import Bucket, in_buckets

Result = TypeVar("Result")
Weights = Iterable[tuple[str, torch.Tensor]]


class WeightEngine(Protocol):
    """What a sync asks of an engine; every method raises EngineError when the engine refuses or is gone."""

    url: str
    incarnation: int  # grows when the engine is restarted
    shares_memory: bool  # it runs on this machine, in the same namespaces: names of shared memory mean the same
    mirror: str | None  # URL of the program that keeps a copy of its weights; see mirror.py

    @property
    def tp_size(self) -> int: ...

    @property
    def quantization(self) -> str | None: ...

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def flush(self) -> None: ...
    def begin_update(self) -> None: ...
    def end_update(self) -> None: ...
    def set_version(self, version: int) -> None: ...
    def weight_version(self) -> int: ...
    def checksums(self) -> list[dict[str, str]]: ...
    def update_from_tensor(self, payloads: Sequence[bytes]) -> None: ...
    def update_from_disk(self, path: str) -> None: ...
    def ask_mirror(self, what: str, body: dict[str, Any]) -> dict[str, Any]: ...
    def update_from_distributed(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group_name: str
    ) -> None: ...
    def join_group(
        self, host: str, port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None: ...
    def leave_group(self, group_name: str) -> None: ...


class Transport(Protocol):
    """Moves weights to engines that are paused."""

    max_bucket_bytes: int | None  # None: as the configuration says

    def session(
        self, engines: Sequence[WeightEngine], version: int
    ) -> AbstractContextManager[Callable[[Bucket], None]]:
        """Gives a function that takes one bucket after the other; its tensors may be reused when it returns.

        When the context ends without an error, every engine has all weights in place; after an error nothing is on its
        way any more. Raises EngineError, at the bucket concerned or later.
        """

    def close(self) -> None: ...


class Check(Protocol):
    """Compares what engines have with what was sent."""

    def follow(self, weights: Weights) -> Weights:
        """The same pairs; takes note of them as they pass."""

    def check(self) -> None:
        """Ask every engine; raises EngineError where one has something else."""


class EngineSync:
    """Implements WeightSync for the rank that drives the engines (global rank 0); other ranks only iterate the weights.

    Args:
        engines: those to update; empty (a replay): weights are iterated, since that is collective, and go nowhere.
        bucket_bytes: tensors are sent in buckets of at most this size, or less where the transport wants that (a larger
            tensor: by itself). Three are in memory at a time: one gathered, one packed, one on its way.
        on_the_way: what is done to the stream before it is sent (quantisation).
        check: what follows the stream and asks the engines afterwards.
    """

    def __init__(
        self,
        transport: Transport,
        engines: Sequence[WeightEngine],
        bucket_bytes: int,
        on_the_way: Callable[[Weights], Weights] | None = None,
        check: Check | None = None,
    ):
        self._transport = transport
        self._on_the_way = on_the_way
        self._check = check
        self._engines = list(engines)
        self._bucket_bytes = min(bucket_bytes, transport.max_bucket_bytes or bucket_bytes)

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Carry (HF name, full tensor) pairs to every engine; return when all report `version`.

        Raises:
            EngineError: an engine refused, is gone, or has other weights than it was sent. The engines stay paused and
                without a version; another push starts from the beginning.
        """
        engines = self._engines
        if engines and self._on_the_way:
            weights = self._on_the_way(weights)
        if engines and self._check:
            weights = self._check.follow(weights)
        buckets = in_buckets(weights, self._bucket_bytes)
        if not engines:
            for _ in buckets:
                pass
            return
        on_all(engines, lambda engine: engine.pause())
        on_all(engines, lambda engine: engine.flush())
        # until all is in place an engine has no version: one that was left half-way can never pass for the old one
        on_all(engines, lambda engine: engine.set_version(UNKNOWN_VERSION))
        with one_thread(), self._transport.session(engines, version) as send:
            for bucket in buckets:
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


@contextmanager
def one_thread() -> Iterator[None]:
    """Copies on the host by one thread; those of the weights are short.

    OpenMP's threads wait for each other after every copy, and a paused engine (SGLang asks for requests without rest)
    has one core to itself: a team that wants all cores then waits for a time slice at each of hundreds of tensors.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def on_all(engines: Sequence[WeightEngine], call: Callable[[WeightEngine], Result]) -> list[Result]:
    """Call for every engine at the same time; results in order, the first error raised when all have ended."""
    if len(engines) == 1:
        return [call(engines[0])]
    with ThreadPoolExecutor(len(engines)) as pool:
        return list(pool.map(call, engines))
