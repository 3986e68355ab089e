"""Algorithm 1 of the paper: self-evolving RLVR with OWPO. Every rank runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from owpo_megatron.types import Group, Objective, Policy, Reference, ReferenceReason, Sample, TrainBatch


class Rollouts(Protocol):
    """Prompts, responses and rewards of a step, the same on every rank."""

    def collect(self, step: int, log: StepLog) -> list[Group]: ...


class Batches(Protocol):
    """From rewards to what the objective needs."""

    def build(self, groups: list[Group], step: int, reference: Reference) -> TrainBatch: ...

    def annotate(
        self, batch: TrainBatch, policy: Policy, reference: Reference, objective: Objective, log: StepLog
    ) -> Iterator[list[Sample]]: ...


class StepLog(Protocol):
    """One line of metrics.jsonl in the making."""

    def timed(self, phase: str) -> Any: ...

    def add(self, **values: Any) -> None: ...

    def add_update(self, sums: dict[str, Any]) -> None: ...


@dataclass
class Loop:
    """The verbs of a run. The parts are built in build.py; the loop knows them by their protocols only."""

    steps: int
    policy: Policy
    reference: Reference
    objective: Objective
    rollouts: Rollouts
    batches: Batches
    push_weights: Callable[[int], None]
    swap_due: Callable[[int], ReferenceReason | None]
    restarts_policy: bool  # after a swap: the next stage starts from its reference
    evaluate_due: Callable[[int], bool]
    checkpoint_due: Callable[[int], bool]
    evaluate: Callable[[int], None]
    save: Callable[[int], None]
    restore: Callable[[], int]
    step_log: Callable[[int], Any]
    stop_requested: Callable[[], bool]

    def run(self) -> int:
        """Train to the end, or to the end of the step in which a stop is requested; returns the steps done."""
        step = self.restore()  # or 0, with the reference being the initial policy (line 2)
        self.push_weights(step)
        if step == 0 and self.evaluate_due(step):
            self.evaluate(step)
        saved = step
        while step < self.steps and not self.stop_requested():
            with self.step_log(step) as log:
                groups = self.rollouts.collect(step, log)  # lines 4-5
                batch = self.batches.build(groups, step, self.reference)  # lines 5-6
                for samples in self.batches.annotate(batch, self.policy, self.reference, self.objective, log):
                    with log.timed("update"):
                        log.add_update(self.policy.update(samples, self.objective))  # lines 7-14
                step += 1
                with log.timed("sync"):
                    self.push_weights(step)
                if self.evaluate_due(step):
                    with log.timed("evaluate"):
                        self.evaluate(step)  # and note the best of the stage
                if reason := self.swap_due(step):
                    with log.timed("swap"):
                        self.reference.swap(step, reason)  # lines 15-16
                        if self.restarts_policy:
                            self.reference.restart_policy()
                            self.push_weights(step)
                if self.checkpoint_due(step):
                    with log.timed("checkpoint"):
                        self.save(step)
                    saved = step
        if saved != step:
            self.save(step)
        return step
