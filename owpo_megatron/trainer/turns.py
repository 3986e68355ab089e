"""Trainer and engines on the same GPUs, which have their memory in turn (engine.in_turn).

                   trainer                                     engines
    collect        at rest                                     take their caches, generate, release cache and weights
    updates        wakes: gradients, moments, masters
    push           at rest                                     take memory for weights, and get them
    evaluate       at rest                                     take their caches, generate, release them
    swap, save     wakes where it needs to

What wakes the trainer is the policy itself; what takes the caches is whatever draws samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from owpo_megatron.trainer.loop import Rollouts
from owpo_megatron.types import Group, StepLog, WeightSync

if TYPE_CHECKING:
    import torch


class RestingPolicy(Protocol):
    """A policy that can do without the memory of its optimizer until its next update."""

    @property
    def resting(self) -> bool: ...

    def rest(self) -> None: ...


class EngineMemory(Protocol):
    """The memory of all engines (engine.turns.EngineTurns)."""

    def free(self, weights: bool = False) -> None: ...
    def take_weights(self) -> None: ...
    def take_cache(self) -> None: ...


class Turns:
    """Runs on every rank. `before` and `after` enclose what rank 0 does with engines (MainRank.run).

    Args:
        barrier: returns when every rank has come to it: an engine shares its GPUs with several ranks.
        engines: their memory, on global rank 0; None elsewhere.
    """

    def __init__(self, policy: RestingPolicy, barrier: Callable[[], None], engines: EngineMemory | None):
        self._policy, self._barrier, self._engines = policy, barrier, engines
        self._generating = False
        self.trains_next = False
        """Whether engines can release their weights as well: they get new ones before they generate again."""

    def before(self) -> None:
        """The trainer rests, on every rank."""
        if not self._policy.resting:
            self._policy.rest()
            self._barrier()

    def take_cache(self) -> None:
        """Engines generate next. On global rank 0."""
        assert self._engines is not None
        self._engines.take_cache()
        self._generating = True

    def after(self) -> None:
        """Engines release what they took to generate. On global rank 0."""
        if self._generating:
            assert self._engines is not None
            self._engines.free(self.trains_next)
            self._generating = False

    def take_weights(self) -> None:
        """Weights come next. On global rank 0."""
        assert self._engines is not None
        self._engines.take_weights()


class RolloutsInTurn:
    """Rollouts after which the policy trains."""

    def __init__(self, rollouts: Rollouts, turns: Turns):
        self._rollouts, self._turns = rollouts, turns

    def collect(self, step: int, log: StepLog) -> list[Group]:
        self._turns.trains_next = True
        try:
            return self._rollouts.collect(step, log)
        finally:
            self._turns.trains_next = False


class SyncInTurn:
    """A WeightSync whose engines have released the memory for weights."""

    def __init__(self, sync: WeightSync, turns: Turns):
        self._sync, self._turns = sync, turns

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self._turns.take_weights()
        self._sync.push(weights, version)

    def close(self) -> None:
        self._sync.close()
