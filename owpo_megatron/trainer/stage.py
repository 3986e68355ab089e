"""When things are due: stages between reference swaps, evaluations, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from owpo_megatron.config import Config
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
    def of(cls, config: Config, has_reference: bool = True) -> StagePlan:
        wants = config.reference
        if not has_reference or wants.refresh == "fixed":
            return cls(config.optimizer.steps, None)
        return cls(config.optimizer.steps, wants.every, wants.refresh or "interval")

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


def due_every(interval: int, steps_done: int, at_end: bool, steps: int) -> bool:
    """Every `interval` steps (0: never), and after the last one where `at_end`."""
    return (interval > 0 and steps_done > 0 and steps_done % interval == 0) or (at_end and steps_done == steps)
