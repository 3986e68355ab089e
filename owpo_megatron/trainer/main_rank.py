"""Work of global rank 0 alone (engines, verifiers, disk), for which the other ranks wait.

rank 0                            other ranks
run(work): work()                 run(work): wait for a message
  needs weights in the engines,     "weights" -> walk through their share of the weights, wait on
  as often as it takes              "order" -> send their share of the weights, wait on
  needs the policy's log-probs        "statistics" -> take part in the pass
send "done", return                 "done"    -> return the same result as rank 0
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import torch

from owpo_megatron.errors import EngineError
from owpo_megatron.trainer.exchange import Exchange
from owpo_megatron.types import Policy, Sample, WeightSync

T = TypeVar("T")


class SendingRank(Protocol):
    """This rank's part in pushes from several ranks."""

    announce: Callable[[Any], object]

    def follow(self, order: Any) -> object:
        """Do what rank 0 announced. Collective."""


class MemoryTurns(Protocol):
    """Trainer and engines that have the same GPUs' memory in turn (turns.py)."""

    def before(self) -> None:
        """The trainer gives up what it can. On every rank."""

    def after(self) -> None:
        """The engines give up what they can. On rank 0."""


class MainRank:
    """Runs work on rank 0, gives its result to all ranks, and brings the policy's weights to rank 0's engines.

    Args:
        broadcast: gives rank 0's object to all ranks (collective).
        weights: (HF name, full tensor) on rank 0, complete only when every rank walks through it (collective).
        sync: rank 0's way to its engines; None on the other ranks.
        turns: of trainer and engines on the same GPUs; None: each has its own memory.
        senders: this rank's part in pushes from several ranks; None: rank 0 sends all weights.
        revive: restarts engines that do not answer or that the error names, calling `push_again` for them; returns how
            many there were.
        policy: for `statistics`; None: nobody asks for them.
        waiting: a block in which this rank waits for rank 0.
        exchange: brings the tokens of `statistics`; None: they come with the samples.
    """

    def __init__(
        self,
        broadcast: Callable[[Any], Any],
        weights: Callable[[], Iterable[tuple[str, torch.Tensor]]],
        sync: WeightSync | None,
        revive: Callable[[EngineError], int],
        policy: Policy | None = None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
        senders: SendingRank | None = None,
        turns: MemoryTurns | None = None,
        exchange: Exchange | None = None,
    ):
        self._broadcast = broadcast
        self._weights = weights
        self._sync = sync
        self._revive = revive
        self._policy = policy
        self._waiting = waiting
        self._exchange = exchange
        self._version = -1
        self._senders, self._turns = senders, turns
        if senders is not None:
            senders.announce = lambda order: self._broadcast(("order", order))

    def run(self, work: Callable[[], T]) -> T:
        """`work()` of rank 0, on every rank. An exception there ends rank 0, and with it the job."""
        if self._turns is not None:
            self._turns.before()
        if self._sync is not None:
            result = work()
            if self._turns is not None:
                self._turns.after()
            self._broadcast(("done", result))
            return result
        while True:
            with self._waiting():
                message, content = self._broadcast(None)
            if message == "done":
                return content
            if message == "statistics":
                self._pass_over(self._bare(content))
            elif message == "order":
                assert self._senders is not None
                self._senders.follow(content)
            else:
                _walk_through(self._weights())

    def statistics(self, samples: Sequence[Sample]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The policy's log-probs and entropies [L] of each sample, on rank 0 inside `run`; every rank takes part."""
        self._broadcast(("statistics", list(samples) if self._exchange is None else None))
        return self._pass_over(self._bare(samples))

    def _bare(self, samples: Sequence[Sample] | None) -> Sequence[Sample]:
        return (samples or []) if self._exchange is None else self._exchange.bare(samples)

    def _pass_over(self, samples: Sequence[Sample]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        assert self._policy is not None, "a plan that looks at log-probs needs a policy"
        return self._policy.logprobs_and_entropies(samples)

    def push(self, version: int) -> None:
        """Carry the policy's weights to every engine; one that is lost on the way is restarted and gets them, once."""
        self._version = version
        self.run(self._push_with_revival)

    def push_again(self) -> None:
        """Push the weights of the last `push` again, on rank 0 inside `run`; every rank takes part."""
        assert self._sync is not None
        weights = _Announced(lambda: self._broadcast(("weights", None)), self._weights)
        try:
            self._sync.push(weights, self._version)
        finally:
            weights.walk_through()  # what an error left over: the other ranks are in the middle of it

    def _push_with_revival(self) -> None:
        try:
            self.push_again()
        except EngineError as error:
            if not self._revive(error):
                self.push_again()


class _Announced:
    """Weights that call the other ranks when they are asked for, if they are."""

    def __init__(self, announce: Callable[[], object], weights: Callable[[], Iterable[tuple[str, torch.Tensor]]]):
        self._announce, self._weights = announce, weights
        self._begun: Iterator[tuple[str, torch.Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        if self._begun is None:
            self._announce()
            self._begun = iter(self._weights())
        return next(self._begun)

    def walk_through(self) -> None:
        """Exhaust them, if they were begun."""
        if self._begun is not None:
            _walk_through(self._begun)


def _walk_through(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    deque(weights, maxlen=0)
