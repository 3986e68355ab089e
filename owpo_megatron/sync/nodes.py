"""One push to engines on every node, by handles to that node's memory: an owner per node.

    each bucket:  its sender -- broadcast --> the lowest rank of every node -- CUDA handle --> engines of that node

A handle means something on its own node alone. So each bucket goes to every node, and its owner hands it to the
engines there. All ranks walk through the buckets in step: a node's owner may gather weights with a sender, and would
otherwise wait for it in one collective while the sender waits in another.

Tested with gloo and a server that records. Not run on a GPU.
"""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from owpo_megatron.engine import EngineClient
from owpo_megatron.errors import EngineError, RunError
from owpo_megatron.sync.bucket import Outbox, Staged
from owpo_megatron.sync.push import WeightEngine, Weights, on_all, one_thread
from owpo_megatron.sync.senders import REACH_SECONDS, Address, Order, Trouble, connected, machine_name

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class AllRanks(Protocol):
    """The trainer's ranks, which can gather each other's objects (mcore.topology.Topology)."""

    @property
    def rank(self) -> int: ...

    def all_gather(self, value: Any) -> list[Any]: ...


class WeightsInStep(Protocol):
    """Weights that all ranks walk through together (MegatronPolicy)."""

    def weights_in_step(self) -> Iterator[tuple[int, list[tuple[str, torch.Tensor]]]]:
        """Yield (sender, (HF name, full tensor) pairs) as often on every rank; the pairs are there on the sender."""


class NodeOwners:
    """This rank's part in pushes through an owner per node; one on every rank. Everything is collective.

    Args:
        weights: the policy.
        senders: the global ranks that have weights.
        deliver: brings a packed bucket to engines of this node.
        allocate: makes a [bytes] uint8 buffer beside the weights.
        transform: applied to the weights of each bucket before sending.
        machine, hosts: this rank's, by name, and the names in URLs that mean it; None: found out.
    """

    def __init__(
        self,
        ranks: AllRanks,
        weights: WeightsInStep,
        senders: Sequence[int],
        deliver: Callable[[Sequence[WeightEngine], Staged], None],
        allocate: Callable[[int, torch.device], torch.Tensor],
        transform: Callable[[Weights], Weights] | None = None,
        machine: str | None = None,
        hosts: Sequence[str] | None = None,
    ):
        self._ranks, self._weights = ranks, weights
        self._deliver = deliver
        self._hosts = (*_LOOPBACK, socket.gethostname()) if hosts is None else tuple(hosts)
        self._transform = transform or (lambda pairs: pairs)
        machines = ranks.all_gather(machine or machine_name())
        self._owner = machines.index(machines[ranks.rank])
        members = sorted({machines.index(one) for one in machines} | set(senders))
        self._takes_part = ranks.rank in members
        self._bytes = dist.new_group(members)  # of the model's backend
        self._words = dist.new_group(members, backend="gloo")
        self._outbox = Outbox(allocate)
        self._clients: dict[str, EngineClient] = {}
        self._mine: list[EngineClient] = []
        self._known: tuple[tuple[str, int], ...] = ()
        self.announce: Callable[[Order], object] = lambda order: None
        """On rank 0: brings an order to all other ranks, which call `follow` with it."""
        self.notify: Callable[[str], None] = lambda text: None

    @property
    def owns_a_node(self) -> bool:
        return self._owner == self._ranks.rank

    def reach(self, engines: Sequence[WeightEngine]) -> bool:
        """Find out, once for these engines, which node each is on. On rank 0.

        Raises:
            EngineError: an engine is on no node of the trainer.
        """
        members = tuple((engine.url, engine.incarnation) for engine in engines)
        if members != self._known:
            name = uuid.uuid4().hex[:8]
            on_all(engines, lambda engine: engine.mark(name))
            self._give(engines, name)
            self._known = members
        return True

    def push(self, engines: Sequence[WeightEngine]) -> None:
        """Send all weights to engines whose update is open. On rank 0; raises as Senders.push."""
        self._give(engines, None)

    def follow(self, order: Order) -> None:
        """Do this rank's part."""
        if order.mark is None:
            self._send()
            return
        mine = [client for client in connected(self._clients, order) if self._is_here(client, order.mark)]
        self._mine = mine if self.owns_a_node else []
        claimed = [url for urls in self._ranks.all_gather([client.url for client in self._mine]) for url in urls]
        lost = [engine.url for engine in order.engines if claimed.count(engine.url) != 1]
        if lost and self._ranks.rank == 0:
            raise EngineError(f"engine {lost[0]} is on no node of the trainer; use sync.transport tensor")

    def close(self) -> None:
        self._outbox.close()
        for client in self._clients.values():
            client.close()

    def _give(self, engines: Sequence[WeightEngine], mark: str | None) -> None:
        addresses = [Address(one.url, one.key, one.incarnation, one.shares_memory) for one in engines]
        order = Order(tuple(addresses), machine_name(), mark)
        self.announce(order)
        self.follow(order)

    def _is_here(self, client: EngineClient, mark: str) -> bool:
        """Whether the engine is on this machine: by its host's name, and its mark where that is 127.0.0.1."""
        if not self.owns_a_node or urlsplit(client.url).hostname not in self._hosts:
            return False
        try:
            return mark in client.model_info(timeout=REACH_SECONDS).get("weight_version", "")
        except EngineError:
            return False

    def _send(self) -> None:
        trouble: Trouble | None = None
        try:
            with one_thread():
                for turn, (sender, pairs) in enumerate(self._weights.weights_in_step()):
                    trouble = self._carry(sender, pairs, turn, trouble)
            troubles = self._ranks.all_gather(trouble)
        except EngineError:
            raise
        except RuntimeError as error:
            raise RunError(f"a rank ended while weights were sent to the engines of every node: {error}") from error
        finally:
            self._outbox.close()  # a handle's record ends with the memory (ipc.py)
        found = next((one for one in troubles if one is not None), None)
        if found is not None and self._ranks.rank == 0:
            raise found.error()

    def _carry(
        self, sender: int, pairs: list[tuple[str, torch.Tensor]], turn: int, trouble: Trouble | None
    ) -> Trouble | None:
        """Bring one bucket from its sender to this node's engines; return what went wrong so far."""
        if not self._takes_part:
            return None
        me = self._ranks.rank
        sent = list(self._transform(pairs)) if me == sender else []
        packed = self._outbox.stage(sent, turn) if sent else None
        facts: list[Any] = [(packed.flat.numel(), packed.flat.device.type, packed.slices) if packed else None]
        dist.broadcast_object_list(facts, src=sender, group=self._words)
        if facts[0] is None:
            return trouble
        size, kind, slices = facts[0]
        if packed is None:
            packed = Staged(self._outbox.buffer(turn, size, _device(kind)), slices)
        dist.broadcast(packed.flat, src=sender, group=self._bytes)
        if packed.flat.is_cuda:
            torch.cuda.current_stream(packed.flat.device).synchronize()  # engines read it on streams of their own
        if trouble is None and self._mine:
            try:
                self._deliver(self._mine, packed)
            except EngineError as error:
                return Trouble.of(error, me)
        return trouble


def _device(kind: str) -> torch.device:
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
