"""The sequence of one weight sync, whatever carries the weights.

    pause (requests in flight are kept) -> flush the caches -> transport: begin, buckets, end -> version -> resume

An engine whose update fails stays paused: it has neither the old weights nor the new ones, and must not generate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch

from owpo_megatron.errors import EngineError

Bucket = list[tuple[str, torch.Tensor]]
Result = TypeVar("Result")


class WeightEngine(Protocol):
    """What a sync asks of an engine; every method raises EngineError when the engine refuses or is gone."""

    url: str
    incarnation: int  # grows when the engine is restarted

    @property
    def tp_size(self) -> int: ...

    def pause(self) -> None: ...
    def resume(self) -> None: ...
    def flush(self) -> None: ...
    def begin_update(self) -> None: ...
    def end_update(self) -> None: ...
    def set_version(self, version: int) -> None: ...
    def weight_version(self) -> int: ...
    def update_from_tensor(self, payload: str) -> None: ...
    def update_from_disk(self, path: str) -> None: ...
    def update_from_distributed(
        self, names: list[str], dtypes: list[str], shapes: list[list[int]], group_name: str
    ) -> None: ...
    def join_group(
        self, host: str, port: int, rank_offset: int, world_size: int, group_name: str, backend: str
    ) -> None: ...
    def leave_group(self, group_name: str) -> None: ...


class Transport(Protocol):
    """Moves buckets to engines that are paused. `begin`, `send` for every bucket, `end`, in this order."""

    def begin(self, engines: Sequence[WeightEngine], version: int) -> None: ...

    def send(self, engines: Sequence[WeightEngine], bucket: Bucket) -> None:
        """The bucket's tensors may be reused when this returns."""

    def end(self, engines: Sequence[WeightEngine]) -> None:
        """When this returns, every engine has all weights in place."""

    def close(self) -> None: ...


class EngineSync:
    """Implements WeightSync for the rank that drives the engines (global rank 0); other ranks only iterate the weights.

    Args:
        engines: those to update; empty (a replay): weights are iterated, since that is collective, and go nowhere.
        bucket_bytes: tensors are sent in buckets of about this size; at most one bucket is held at a time.
    """

    def __init__(self, transport: Transport, engines: Sequence[WeightEngine], bucket_bytes: int):
        self._transport = transport
        self._engines = list(engines)
        self._bucket_bytes = bucket_bytes

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Carry (HF name, full tensor) pairs to every engine; return when all report `version`.

        Raises:
            EngineError: an engine refused or is gone. The engines stay paused; another push starts from the beginning.
        """
        engines = self._engines
        buckets = in_buckets(weights, self._bucket_bytes)
        if not engines:
            for _ in buckets:
                pass
            return
        on_all(engines, lambda engine: engine.pause())
        on_all(engines, lambda engine: engine.flush())
        self._transport.begin(engines, version)
        for bucket in buckets:
            self._transport.send(engines, bucket)
        self._transport.end(engines)
        on_all(engines, lambda engine: engine.set_version(version))
        on_all(engines, lambda engine: engine.resume())
        reported = on_all(engines, lambda engine: engine.weight_version())
        for engine, got in zip(engines, reported, strict=True):
            if got != version:
                raise EngineError(f"engine {engine.url} reports weight version {got} after a push of version {version}")

    def close(self) -> None:
        self._transport.close()


def in_buckets(weights: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Consecutive tensors of at most `bucket_bytes` together; a larger tensor is a bucket of its own."""
    bucket: Bucket = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach()))
        size += tensor.nbytes
    if bucket:
        yield bucket


def on_all(engines: Sequence[WeightEngine], call: Callable[[WeightEngine], Result]) -> list[Result]:
    """Call for every engine at the same time; results in order, the first error raised when all have ended."""
    if len(engines) == 1:
        return [call(engines[0])]
    with ThreadPoolExecutor(len(engines)) as pool:
        return list(pool.map(call, engines))
