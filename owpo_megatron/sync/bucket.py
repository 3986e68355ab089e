"""Buckets of named tensors, and the two reused buffers through which they leave the trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import torch

Bucket = list[tuple[str, torch.Tensor]]
STAGES = 2  # one is filled while the other one is on its way


@dataclass(frozen=True)
class Slice:
    """Where a tensor lies in a staged bucket."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # bytes; a multiple of the dtype's size


@dataclass(frozen=True)
class Staged:
    """A bucket as one run of bytes, tensors of large element size first: every tensor is then aligned, unpadded."""

    flat: torch.Tensor  # [bytes] uint8, a view of a reused buffer
    slices: tuple[Slice, ...]


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


def beside(size: int, device: torch.device) -> torch.Tensor:
    """A buffer on the device of the tensors."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def on_host(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8)


class Outbox:
    """Copies buckets into one of two buffers and delivers them in other threads.

    While a bucket is on its way the next one is gathered and packed, so memory is two buckets, whatever the model's
    size. The buffers are kept between updates: fresh memory costs more than the copy into it.

    Args:
        allocate: makes a [bytes] uint8 buffer for a first tensor's device.
    """

    def __init__(self, allocate: Callable[[int, torch.device], torch.Tensor]):
        self._allocate = allocate
        self._buffers: list[torch.Tensor | None] = [None] * STAGES

    def open(self, deliver: Callable[[Staged], None], at_once: int = 1) -> Delivery:
        """A context in which `put` accepts buckets; it ends when all are delivered. Raises what `deliver` raises.

        Args:
            at_once: 1: in order, one after the other; STAGES: the next is on its way before the last one has arrived.
        """
        return Delivery(self, deliver, at_once)

    def stage(self, bucket: Bucket, turn: int) -> Staged:
        """Pack the bucket into a buffer; valid until the same buffer's next turn."""
        ordered = sorted(bucket, key=lambda item: -item[1].element_size())  # stable
        total = sum(tensor.nbytes for _, tensor in ordered)
        flat = self._buffer(turn, total, ordered[0][1].device)[:total]
        slices, offset = [], 0
        for name, tensor in ordered:
            target = flat[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor)
            slices.append(Slice(name, tensor.dtype, tuple(tensor.shape), offset))
            offset += tensor.nbytes
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()  # another thread and its stream read it next
        return Staged(flat, tuple(slices))

    def close(self) -> None:
        self._buffers = [None] * STAGES

    def _buffer(self, turn: int, size: int, device: torch.device) -> torch.Tensor:
        buffer = self._buffers[turn % STAGES]
        if buffer is None or buffer.numel() < size:
            self._buffers[turn % STAGES] = buffer = None  # the old one goes before the new one comes
            buffer = self._allocate(size, device)
            self._buffers[turn % STAGES] = buffer
        return buffer


class Delivery:
    """The buckets of one update on their way; see Outbox.open."""

    def __init__(self, outbox: Outbox, deliver: Callable[[Staged], None], at_once: int):
        self._outbox, self._deliver = outbox, deliver
        self._pool = ThreadPoolExecutor(at_once, "weights")
        self._under_way: list[Future[None]] = []
        self._turn = 0

    def put(self, bucket: Bucket) -> None:
        """Take a bucket; its tensors may be reused when this returns. Raises what an earlier delivery raised."""
        while len(self._under_way) >= STAGES:
            self._under_way.pop(0).result()
        staged = self._outbox.stage(bucket, self._turn)
        self._turn += 1
        self._under_way.append(self._pool.submit(self._deliver, staged))

    def __enter__(self) -> Delivery:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=error is not None)
        if error is None:
            for delivery in self._under_way:
                delivery.result()
