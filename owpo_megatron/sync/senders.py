"""One push from several ranks: each sends the weights that it has, in turn, and rank 0 orders them.

    rank 0: pause ... version -1, begin -> rank 0 sends -> rank 4 sends -> ... -> rank 0: end, version ..., resume

An engine takes one bucket at a time, and engines that share a broadcast must take part in the same one: so the senders
take turns, and what passes from one to the next is the word that it may begin, or why the push has failed. A sender
gathers its first bucket before its turn. After a failure the others send nothing, but still gather: the ranks that they
gather with are in the middle of it.
"""

from __future__ import annotations

import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch

from owpo_megatron.engine import EngineClient, EngineGone
from owpo_megatron.errors import EngineError, RunError, one_line
from owpo_megatron.sync.bucket import Bucket, in_buckets
from owpo_megatron.sync.push import UpdateRequests, WeightEngine, Weights, on_all, one_thread

REACH_SECONDS = 10.0
_SHM = Path("/dev/shm")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Ranks(Protocol):
    """The trainer's ranks, which can send each other objects (mcore.topology.Topology)."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def send(self, value: Any, to: int) -> None: ...
    def receive(self, source: int) -> Any: ...
    def all_gather(self, value: Any) -> list[Any]: ...


class PartedWeights(Protocol):
    """Weights in parts, each of which one rank has whole (MegatronPolicy)."""

    def weight_senders(self) -> list[int]:
        """The global rank that has each part; `[0]`: rank 0 has all. Collective."""

    def weight_parts(self) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        """Yield for each part (HF name, full tensor) on its sender. Collective: every rank exhausts every part."""


@dataclass(frozen=True)
class Address:
    """An engine, as other ranks find it."""

    url: str
    key: str | None
    incarnation: int
    shares_memory: bool  # with rank 0


@dataclass(frozen=True)
class Order:
    """Request of rank 0 to every rank."""

    engines: tuple[Address, ...]
    machine: str  # rank 0's
    mark: str | None  # find out whether this rank reaches each engine, which has this mark; None: send


@dataclass(frozen=True)
class Trouble:
    """Why a push did not come to its end."""

    text: str
    url: str | None = None  # the engine that is gone
    ends_the_run: bool = False  # a rank is gone

    @classmethod
    def of(cls, error: EngineError, rank: int) -> Trouble:
        return cls(f"{error} (weights of rank {rank})", error.url if isinstance(error, EngineGone) else None)

    def error(self) -> EngineError | RunError:
        if self.ends_the_run:
            return RunError(self.text)
        if self.url is None:
            return EngineError(self.text)
        return EngineGone(self.url, self.text.removeprefix(f"engine {self.url}"))


class Senders:
    """This rank's part in pushes from several ranks; one on every rank. Collective like the weights it sends.

    Args:
        weights: the policy.
        transport: this rank's own way to the engines.
        bucket_bytes: as EngineSync.
        transform: applied to the weights of each part before sending.
    """

    def __init__(
        self,
        ranks: Ranks,
        weights: PartedWeights,
        transport: UpdateRequests,
        bucket_bytes: int,
        transform: Callable[[Weights], Weights] | None = None,
    ):
        self._ranks, self._weights = ranks, weights
        self._senders = weights.weight_senders()
        self._transport, self._transform = transport, transform or (lambda pairs: pairs)
        self._bucket_bytes = min(bucket_bytes, transport.max_bucket_bytes or bucket_bytes)
        self._clients: dict[str, EngineClient] = {}
        self._own_word: Trouble | None = None  # from one part of this rank to the next
        self._reached: dict[tuple[tuple[str, int], ...], bool] = {}
        self.announce: Callable[[Order], object] = lambda order: None
        """On rank 0: brings an order to all other ranks, which call `follow` with it."""
        self.notify: Callable[[str], None] = lambda text: None
        """Called with a line where all weights go through rank 0 instead."""

    # ------------------------------------------------------------------------------------------ rank 0
    def reach(self, engines: Sequence[WeightEngine]) -> bool:
        """Find out, once for these engines, whether every sender reaches each of them. On rank 0."""
        members = tuple((engine.url, engine.incarnation) for engine in engines)
        if members not in self._reached:
            name = uuid.uuid4().hex[:8]
            on_all(engines, lambda engine: engine.mark(name))
            reasons = [reason for reason in self._give(engines, name) if reason]
            self._reached = {members: not reasons}
            if reasons:
                self.notify(f"{reasons[0]}; all weights go through rank 0")
        return self._reached[members]

    def push(self, engines: Sequence[WeightEngine]) -> None:
        """Send all parts to engines whose update is open. On rank 0.

        Raises:
            EngineError: an engine refused or is gone.
            RunError: a rank ended meanwhile; on every rank.
        """
        self._give(engines)

    def _give(self, engines: Sequence[WeightEngine], mark: str | None = None) -> list[str]:
        addresses = [Address(one.url, one.key, one.incarnation, one.shares_memory) for one in engines]
        order = Order(tuple(addresses), machine_name(), mark)
        self.announce(order)
        return self.follow(order)

    # ------------------------------------------------------------------------------------------ every rank
    def follow(self, order: Order) -> list[str]:
        """Do this rank's part; on rank 0, return why senders do not reach engines, where that was the question."""
        if order.mark is None:
            self._send(order)
            return []
        others = sorted(set(self._senders) - {0})
        if self._ranks.rank == 0:
            return [self._hear(rank) for rank in others]
        if self._ranks.rank in others:
            self._ranks.send(self._out_of_reach(order), 0)
        return []

    def close(self) -> None:
        self._transport.close()
        for client in self._clients.values():
            client.close()

    def _hear(self, rank: int) -> str:
        try:
            return str(self._ranks.receive(rank))
        except RuntimeError as error:
            raise RunError(f"rank {rank}, which sends weights, has ended") from error

    def _out_of_reach(self, order: Order) -> str:
        for client in connected(self._clients, order):
            try:
                found = client.model_info(timeout=REACH_SECONDS).get("weight_version", "")
            except EngineError as error:
                return f"rank {self._ranks.rank} does not reach an engine: {error}"
            if order.mark not in found:  # an address like 127.0.0.1, which is another server's on this machine
                return f"rank {self._ranks.rank} finds another server at {client.url}"
        return ""

    def _send(self, order: Order) -> None:
        me = self._ranks.rank
        for number, (sender, weights) in enumerate(zip(self._senders, self._weights.weight_parts(), strict=True)):
            if sender == me:
                self._take_turn(number, weights, order)
                continue
            try:
                _walk_through(weights)
            except RuntimeError as error:
                raise RunError(f"rank {sender}, or one that has weights with it, ended during a push") from error
        self._end()

    def _take_turn(self, number: int, weights: Iterator[tuple[str, torch.Tensor]], order: Order) -> None:
        """Send a part, once the sender before has sent its own; report to the next one."""
        me = self._ranks.rank
        trouble: Trouble | None = None
        try:
            with one_thread():
                buckets = in_buckets(self._transform(weights), self._bucket_bytes)
                first = list(next(buckets, []))
                trouble = self._word_from(number - 1)
                if trouble is None and first:
                    trouble = self._deliver(chain([first], buckets), order)
                _walk_through(buckets)
        except Exception as error:
            trouble = Trouble(f"rank {me} could not send its weights: {one_line(error)}", ends_the_run=True)
            self._pass_on(number, trouble)
            raise RunError(trouble.text) from error
        self._pass_on(number, trouble)

    def _deliver(self, buckets: Iterable[Bucket], order: Order) -> Trouble | None:
        try:
            with self._transport.sending(connected(self._clients, order)) as send:
                for bucket in buckets:
                    send(bucket)
        except EngineError as error:
            return Trouble.of(error, self._ranks.rank)
        return None

    def _word_from(self, number: int) -> Trouble | None:
        """Wait for the sender of part `number`; return why the push has failed by then."""
        if number < 0:
            return None
        sender = self._senders[number]
        if sender == self._ranks.rank:
            return self._own_word
        try:
            word: Trouble | None = self._ranks.receive(sender)
        except RuntimeError:
            return Trouble(f"rank {sender} ended while weights were sent to the engines", ends_the_run=True)
        return word

    def _pass_on(self, number: int, trouble: Trouble | None) -> None:
        to = self._senders[number + 1] if number + 1 < len(self._senders) else 0
        self._own_word = trouble
        if to != self._ranks.rank:
            self._try_to_send(trouble, to)

    def _end(self) -> None:
        """Hear from rank 0 how the push went: every rank that is still there ends with the same error."""
        if self._ranks.rank == 0:
            trouble = self._word_from(len(self._senders) - 1)
            for rank in range(1, self._ranks.world_size):
                self._try_to_send(trouble, rank)
            if trouble is not None:
                raise trouble.error()
            return
        try:
            trouble = self._ranks.receive(0)
        except RuntimeError as error:
            raise RunError("rank 0 ended while weights were sent to the engines") from error
        if trouble is not None and trouble.ends_the_run:
            raise trouble.error()

    def _try_to_send(self, trouble: Trouble | None, to: int) -> None:
        try:
            self._ranks.send(trouble, to)
        except RuntimeError:
            pass  # it has ended; who waits for it learns so


def connected(clients: dict[str, EngineClient], order: Order) -> list[EngineClient]:
    """Return this rank's clients of the engines, kept in `clients`; those of restarted engines are connected anew."""
    for engine in order.engines:
        client = clients.get(engine.url)
        if client is None:
            client = clients[engine.url] = EngineClient(engine.url, key=engine.key)
        if client.incarnation != engine.incarnation:
            client.connect(engine.url, engine.key)
            client.incarnation = engine.incarnation
        client.shares_memory = engine.shares_memory and machine_name() == order.machine
    return [clients[engine.url] for engine in order.engines]


def machine_name() -> str:
    """A name that programs have in common if they see the same shared memory."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else os.uname().nodename
    return f"{boot} {_SHM.stat().st_dev if _SHM.is_dir() else ''}"


def _walk_through(items: Iterable[Any]) -> None:
    deque(items, maxlen=0)
