"""Transport by broadcast in a process group of this process (rank 0) and the engines' ranks; gloo or NCCL."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Backend, GroupName, PrefixStore, _new_process_group_helper, _world

from owpo_megatron.engine.bound_store import BoundStore
from owpo_megatron.errors import EngineError
from owpo_megatron.sync.bucket import Bucket, Outbox, Staged, on_device
from owpo_megatron.sync.push import UpdateRequests, WeightEngine

TIMEOUT = timedelta(seconds=300)


class DistributedTransport(UpdateRequests):
    """POST /update_weights_from_distributed, and a broadcast of the bucket as contiguous bytes.

    The group is created at the first push, and again after an engine was restarted. It is independent of the trainer's
    process groups.

    Args:
        backend: "nccl" for weights on a GPU, "gloo" for weights on the host; None chooses by the first tensor's device.
    """

    def __init__(self, backend: str | None = None):
        self._backend = backend
        # SGLang allocates fresh memory for every bucket, which costs more than the copies on a host. Memory of small
        # buckets is reused, and packing, sending and loading overlap.
        self.max_bucket_bytes: int | None = None if torch.cuda.is_available() else 32 << 20
        self._outbox = Outbox(on_device)
        self._group: dist.ProcessGroup | None = None
        self._members: list[tuple[str, int]] = []
        self._engines: list[WeightEngine] = []
        self._name = ""

    @contextmanager
    def sending(self, engines: Sequence[WeightEngine]) -> Iterator[Callable[[Bucket], None]]:
        with self._outbox.open(lambda staged: self._broadcast(engines, staged)) as delivery:
            yield delivery.put

    def _broadcast(self, engines: Sequence[WeightEngine], staged: Staged) -> None:
        members = [(engine.url, engine.incarnation) for engine in engines]
        if self._group is None or members != self._members:
            self._leave()
            self._open(engines, self._backend or ("nccl" if staged.flat.is_cuda else "gloo"))
            self._members = members
        names = [where.name for where in staged.slices]
        dtypes = [str(where.dtype).removeprefix("torch.") for where in staged.slices]
        shapes = [list(where.shape) for where in staged.slices]
        try:
            self._together(
                engines,
                lambda engine: engine.update_from_distributed(names, dtypes, shapes, self._name),
                lambda: dist.broadcast(staged.flat, src=0, group=self._group),
            )
        except EngineError:
            self._leave()  # a group that lost a member cannot be used again
            raise

    def close(self) -> None:
        self._leave()
        self._outbox.close()

    def _leave(self) -> None:
        """Leave the group; engines that are gone have left it already."""
        if self._group is None:
            return
        for engine in self._engines:
            try:
                engine.leave_group(self._name)
            except EngineError:
                continue
        dist.destroy_process_group(self._group)
        self._group = None

    def _open(self, engines: Sequence[WeightEngine], backend: str) -> None:
        self._engines, self._name = list(engines), f"owpo-{uuid.uuid4().hex[:8]}"
        *offsets, world_size = accumulate((engine.tp_size for engine in engines), initial=1)
        seen_from = {id(engine): address_seen_from(engine.url) for engine in engines}
        # A store of our own: under torchrun, `rendezvous` would return the launcher's store. It listens where the
        # engines look for it; on every interface only where they look in different places.
        host, *others = sorted(set(seen_from.values()))
        where = "0.0.0.0" if others else host
        store = BoundStore(where, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        offset_of = dict(zip(map(id, engines), offsets, strict=True))

        def join(engine: WeightEngine) -> None:
            engine.join_group(seen_from[id(engine)], store.port, offset_of[id(engine)], world_size, self._name, backend)

        def make() -> dist.ProcessGroup:
            # as SGLang creates its side of the group: with or without a default group
            ours = PrefixStore(self._name, store)
            name = GroupName(self._name)
            group, _ = _new_process_group_helper(
                world_size, 0, [], Backend(backend), ours, group_name=name, timeout=TIMEOUT
            )
            _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
            return group

        self._group = self._together(engines, join, make)

    @staticmethod
    def _together(
        engines: Sequence[WeightEngine],
        theirs: Callable[[WeightEngine], None],
        ours: Callable[[], dist.ProcessGroup | None],
    ) -> dist.ProcessGroup | None:
        """Run our side of a collective while the engines, asked over HTTP, run theirs."""
        with ThreadPoolExecutor(len(engines)) as pool:
            asked = [pool.submit(theirs, engine) for engine in engines]
            try:
                result = ours()
            except RuntimeError as error:
                for answer in asked:
                    answer.result()  # the engine's own reason, where it has one
                raise EngineError(f"the collective with {[e.url for e in engines]} failed: {error}") from error
            for answer in asked:
                answer.result()
        return result


def address_seen_from(url: str) -> str:
    """Return the address of this machine that the engine at `url` can reach."""
    parts = urlsplit(url)
    assert parts.hostname is not None, url
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing, only selects the interface
        return str(probe.getsockname()[0])
