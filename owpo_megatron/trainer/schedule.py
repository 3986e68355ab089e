"""Schedule of stages between reference swaps, of evaluations and of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from owpo_megatron.config import CheckpointConfig, Config, EvalConfig, ReferenceConfig
from owpo_megatron.types import ReferenceReason


@dataclass(frozen=True)
class StagePlan:
    """A stage is the interval between two swaps; with a fixed reference, or without one, it is the whole run.

    Example: 50 steps with a swap every 20 have the stages 0 (steps 0-19), 1 (20-39) and 2 (40-49).
    """

    steps: int
    every: int | None  # steps between swaps, None: never
    reason: ReferenceReason = "interval"  # of its swaps

    @classmethod
    def of(cls, reference: ReferenceConfig, steps: int, has_reference: bool = True) -> StagePlan:
        if not has_reference or reference.refresh == "fixed":
            return cls(steps, None)
        return cls(steps, reference.every, reference.refresh or "interval")

    @property
    def chooses_best(self) -> bool:
        """Swaps take the best evaluated policy of the stage, so that each stage ends with an evaluation."""
        return self.every is not None and self.reason == "best_of_stage"

    def stage(self, step: int) -> int:
        return step // self.every if self.every else 0

    def step_in_stage(self, step: int) -> int:
        return step % self.every if self.every else step

    def stage_steps(self, step: int) -> int:
        """Length of the stage that `step` lies in; the last one may be shorter."""
        if not self.every:
            return self.steps
        return min(self.every, self.steps - self.stage(step) * self.every)

    def swap_due(self, steps_done: int) -> ReferenceReason | None:
        """The reason of the swap after so many steps, None where none is due."""
        return self.reason if self.every is not None and steps_done % self.every == 0 else None


@dataclass(frozen=True)
class Schedule:
    """Evaluations, checkpoints and swaps that are due after so many finished steps.

    Example: with `evaluations` every 10 steps, before and after, and 25 steps: after 0, 10, 20 and 25 of them.
    """

    stages: StagePlan
    evaluations: EvalConfig = EvalConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    restarts_policy: bool = False  # after a swap the next stage starts from its reference

    @classmethod
    def of(cls, config: Config, has_reference: bool) -> Schedule:
        """Return the schedule of a run; without a reference (or with teachers instead) nothing is swapped."""
        stages = StagePlan.of(config.reference, config.optimizer.steps, has_reference)
        restarts = config.reference.restart_policy and stages.chooses_best
        return cls(stages, config.eval, config.checkpoint, restarts)

    @property
    def steps(self) -> int:
        """Length of the run."""
        return self.stages.steps

    def swap_due(self, done: int) -> ReferenceReason | None:
        return self.stages.swap_due(done)

    def evaluation_due(self, done: int) -> bool:
        wants = self.evaluations
        if done == 0:
            return wants.before
        if self.stages.chooses_best and self.swap_due(done):
            return True
        return due_every(wants.every, done, at_end=wants.after, steps=self.steps)

    def checkpoint_due(self, done: int) -> bool:
        return due_every(self.checkpoints.every, done, at_end=True, steps=self.steps)


def due_every(interval: int, steps_done: int, at_end: bool, steps: int) -> bool:
    """Every `interval` steps (0: never), and after the last one where `at_end`."""
    return (interval > 0 and steps_done > 0 and steps_done % interval == 0) or (at_end and steps_done == steps)
