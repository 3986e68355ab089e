"""Buckets of named tensors, and the two reused buffers they are sent from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch

Bucket = list[tuple[str, torch.Tensor]]
STAGES = 2  # one buffer is filled while the other is in flight


@dataclass(frozen=True)
class Slice:
    """Position of a tensor in a staged bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes; a multiple of the dtype's size


@dataclass(frozen=True)
class Staged:
    """A bucket as contiguous bytes; tensors of large element size come first, so all are aligned without padding."""

    flat: torch.Tensor  # [bytes] uint8, a view of a reused buffer
    slices: tuple[Slice, ...]


def in_buckets(weights: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Group consecutive tensors into buckets of at most `bucket_bytes`; a larger tensor gets a bucket of its own."""
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


def on_device(size: int, device: torch.device) -> torch.Tensor:
    """Allocate a buffer on the device of the tensors."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def on_host(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


class Outbox:
    """Copies buckets into one of two buffers and delivers them from other threads.

    While one bucket is in flight the next is gathered and packed, so memory is two buckets whatever the size of the
    model. The buffers are kept between updates: allocating fresh memory costs more than the copy into it.

    Args:
        allocate: returns a [bytes] uint8 buffer for the device of the first tensor.
    """

    def __init__(self, allocate: Callable[[int, torch.device], torch.Tensor]):
        self._allocate = allocate
        self._buffers: list[torch.Tensor | None] = [None] * STAGES

    def open(self, deliver: Callable[[Staged], None], at_once: int = 1) -> Delivery:
        """Return a context in which `put` accepts buckets; it exits once all are delivered. Raises `deliver`'s errors.

        Args:
            at_once: deliveries in flight: 1 for one after the other, STAGES to start one before the last has arrived.
        """
        return Delivery(self, deliver, at_once)

    def stage(self, bucket: Bucket, turn: int) -> Staged:
        """Pack the bucket into a buffer; valid until that buffer's next turn."""
        ordered = sorted(bucket, key=lambda item: -item[1].element_size())  # stable
        total = sum(tensor.nbytes for _, tensor in ordered)
        flat = self.buffer(turn, total, ordered[0][1].device)
        slices, offset = [], 0
        for name, tensor in ordered:
            target = flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor)
            slices.append(Slice(name, tensor.dtype, tuple(tensor.shape), offset))
            offset += tensor.nbytes
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()  # another thread reads it next, on its own stream
        return Staged(flat, tuple(slices))

    def close(self) -> None:
        self._buffers = [None] * STAGES

    def buffer(self, turn: int, size: int, device: torch.device) -> torch.Tensor:
        """Return [size] uint8 of the buffer whose turn it is."""
        buffer = self._buffers[turn % STAGES]
        if buffer is None or buffer.numel() < size:
            self._buffers[turn % STAGES] = buffer = None  # free the old one before the new one is allocated
            buffer = self._allocate(size, device)
            self._buffers[turn % STAGES] = buffer
        return buffer[:size]


class Delivery:
    """Buckets of one update in flight; see Outbox.open."""

    def __init__(self, outbox: Outbox, deliver: Callable[[Staged], None], at_once: int):
        self._outbox, self._deliver = outbox, deliver
        self._pool = ThreadPoolExecutor(at_once, "weights")
        self._in_flight: list[Future[None]] = []
        self._turn = 0

    def put(self, bucket: Bucket) -> None:
        """Queue a bucket; its tensors may be reused when this returns. Raises what an earlier delivery raised."""
        while len(self._in_flight) >= STAGES:
            self._in_flight.pop(0).result()
        staged = self._outbox.stage(bucket, self._turn)
        self._turn += 1
        self._in_flight.append(self._pool.submit(self._deliver, staged))

    def __enter__(self) -> Delivery:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if error is None:
            for delivery in self._in_flight:
                delivery.result()
