"""Algorithm 1 of the paper: self-evolving RLVR with OWPO. Every rank runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from owpo_megatron.methods import Method
from owpo_megatron.trainer.schedule import Schedule
from owpo_megatron.types import Group, Policy, Sample, StepLog, Swappable


class Rollouts(Protocol):
    """Responses and rewards of a step: the same on every rank, without the tokens, which stay where they were drawn."""

    def collect(self, step: int, log: StepLog) -> list[Group]: ...


class Batches(Protocol):
    """Turns rewards into the method's inputs: advantages, active samples, old and reference log-probs."""

    def prepare(self, groups: Sequence[Group], step: int, log: StepLog) -> Iterator[list[Sample]]:
        """The step's minibatches; tokens, and log-probs of the step's start, are on the ranks that train on them."""


class Engines(Protocol):
    """The engines that generate."""

    def push(self, version: int) -> None:
        """Bring them the policy's weights. Collective."""


class Record(Protocol):
    """Writes the run's files and resumes from them. Every method is collective."""

    def restore(self) -> int:
        """Take up the newest checkpoint; returns its step, or 0 with the reference being the initial policy."""

    def save(self, step: int) -> None:
        """Save what the run resumes from; it may be written while the next steps train."""

    def settle(self) -> None:
        """Return when everything that was saved is on the disk."""

    def evaluate(self, step: int) -> None: ...

    def step(self, step: int) -> AbstractContextManager[StepLog]:
        """The metrics line of a step, written when the block ends."""

    def stop_requested(self) -> bool: ...


@dataclass
class Loop:
    """The verbs of a run. build.py makes the parts; the loop knows them by their protocols only."""

    schedule: Schedule
    policy: Policy
    method: Method
    rollouts: Rollouts
    batches: Batches
    ratchet: Swappable | None  # None: there is no reference, or it is fixed
    engines: Engines
    record: Record

    def run(self) -> int:
        """Train to the end, or to the end of the step in which a stop is requested; returns the steps done."""
        step = self.record.restore()  # line 2
        self.engines.push(step)
        if step == 0 and self.schedule.evaluation_due(step):
            self.record.evaluate(step)
        saved = step
        while step < self.schedule.steps and not self.record.stop_requested():
            with self.record.step(step) as log:
                groups = self.rollouts.collect(step, log)  # lines 4-5
                for samples in self.batches.prepare(groups, step, log):  # lines 5-6
                    with log.timed("update"):
                        log.add_update(self.policy.update(samples, self.method))  # lines 7-14
                step += 1
                with log.timed("sync"):
                    self.engines.push(step)
                if self.schedule.evaluation_due(step):
                    with log.timed("evaluate"):
                        self.record.evaluate(step)  # and note the best of the stage
                if self.ratchet and (reason := self.schedule.swap_due(step)):
                    with log.timed("swap"):
                        self.ratchet.swap(step, reason)  # lines 15-16
                        if self.schedule.restarts_policy:
                            self.ratchet.restart_policy()
                            self.engines.push(step)
                if self.schedule.checkpoint_due(step):
                    with log.timed("checkpoint"):
                        self.record.save(step)
                    saved = step
        if saved != step:
            self.record.save(step)
        self.record.settle()
        return step
