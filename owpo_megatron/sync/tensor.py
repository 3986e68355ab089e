"""Transport by tensors in the HTTP request: needs neither a process group nor a file system."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from owpo_megatron.sync.bucket import STAGES, Bucket, Outbox, Staged, on_host
from owpo_megatron.sync.payload import by_reference, by_value, shared_memory
from owpo_megatron.sync.push import UpdateRequests, WeightEngine, on_all

SHARED_MEMORY = Path("/dev/shm")


class TensorTransport(UpdateRequests):
    """POST /update_weights_from_tensor.

    Engines that the run started itself open this machine's shared memory by name; others get the bytes in base64.

    Args:
        share: False sends by value to every engine.
        keep: the buffers between updates; False frees them when all is sent.
    """

    # Two of these must fit into a small shared memory (64 MB in a container by default). By value, small requests keep
    # SGLang's many copies in memory that it reuses.
    max_bucket_bytes: int | None = 16 << 20

    def __init__(self, share: bool = True, keep: bool = True) -> None:
        self._share, self._keep = share, keep
        self._shared, self._private = Outbox(_shared), Outbox(on_host)

    @contextmanager
    def sending(self, engines: Sequence[WeightEngine]) -> Iterator[Callable[[Bucket], None]]:
        near = {engine.url: self._share and engine.shares_memory for engine in engines}

        def deliver(staged: Staged) -> None:
            named = {url: is_near and staged.flat.is_shared() for url, is_near in near.items()}
            value = b"" if all(named.values()) else by_value(staged)

            def send(engine: WeightEngine) -> None:
                # a handle counts its readers, so each tensor-parallel rank gets a pickle of its own
                payloads = [by_reference(staged) if named[engine.url] else value for _ in range(engine.tp_size)]
                engine.update_from_tensor(payloads)

            on_all(engines, send)

        outbox = self._shared if any(near.values()) else self._private
        # by reference, an engine unpacks one bucket while it loads another; by value, a second means ten more copies
        with outbox.open(deliver, at_once=STAGES if all(near.values()) else 1) as delivery:
            yield delivery.put
        if not self._keep:
            self.close()

    def close(self) -> None:
        self._shared.close()
        self._private.close()


def _shared(size: int, device: torch.device) -> torch.Tensor:
    """Allocate shared memory, or private memory if there is too little: touching more than exists kills the process."""
    free = os.statvfs(SHARED_MEMORY).f_bavail * os.statvfs(SHARED_MEMORY).f_frsize if SHARED_MEMORY.is_dir() else 0
    if free < size:
        warnings.warn(
            f"{SHARED_MEMORY} has {free >> 20} MB free and a bucket needs {size >> 20} MB: buckets are sent inline, "
            "which is slow. Enlarge it (docker run --shm-size) or use sync.transport distributed",
            stacklevel=2,
        )
        return on_host(size, device)
    return shared_memory(size)
