"""The parts of a run on this rank, as build.py makes them or as they were given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from owpo_megatron.families import HFModel
from owpo_megatron.methods import Method
from owpo_megatron.run.best import BestWeights
from owpo_megatron.run.state import RunState
from owpo_megatron.trainer.batches import BatchBuilder
from owpo_megatron.trainer.console import RunConsole
from owpo_megatron.trainer.evaluate import Evaluator
from owpo_megatron.trainer.loop import Engines, Loop, Record, Rollouts
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.trainer.schedule import Schedule
from owpo_megatron.trainer.stop import StopSignal
from owpo_megatron.trainer.watchdog import Watchdog
from owpo_megatron.types import (
    Policy,
    PromptStream,
    Ranks,
    Reference,
    RolloutEngine,
    Swappable,
    Verifier,
)


@dataclass(frozen=True)
class Parts:
    """Everything a run is made of.

    Engine, verifier, stream, evaluator and console are global rank 0's; None elsewhere.
    """

    ranks: Ranks
    schedule: Schedule
    method: Method
    model: HFModel
    policy: Policy
    reference: Reference
    ratchet: Swappable | None  # the reference, where it is one that swaps
    engine: RolloutEngine | None
    describe_engine: Callable[[], dict[str, str]]  # what generates, for the summary; nothing for recorded rollouts
    verifier: Verifier | None
    stream: PromptStream | None
    main: MainRank  # work of rank 0 while the others take part in the weights
    engines: Engines
    rollouts: Rollouts
    batches: BatchBuilder
    evaluator: Evaluator | None
    record: Record
    state: RunState
    best: BestWeights
    stop: StopSignal
    console: RunConsole | None
    watchdog: Watchdog

    def loop(self) -> Loop:
        return Loop(
            self.schedule,
            self.policy,
            self.method,
            self.rollouts,
            self.batches,
            self.ratchet,
            self.engines,
            self.record,
        )

    def say(self, text: str) -> None:
        if self.console:
            self.console.say(text)
