"""When things are due: stages between reference swaps, evaluations, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from owpo_megatron.config import Config


@dataclass(frozen=True)
class StagePlan:
    """A stage is the interval between two swaps; with a fixed reference, or without one, it is the whole run.

    Example: 50 steps with a swap every 20 have the stages 0 (steps 0-19), 1 (20-39) and 2 (40-49).
    """

    steps: int
    every: int | None  # steps between swaps, None: never

    @classmethod
    def of(cls, config: Config, has_reference: bool = True) -> StagePlan:
        interval = has_reference and config.reference.refresh == "interval"
        return cls(config.optimizer.steps, config.reference.every if interval else None)

    def stage(self, step: int) -> int:
        return step // self.every if self.every else 0

    def step_in_stage(self, step: int) -> int:
        return step % self.every if self.every else step

    def stage_steps(self, step: int) -> int:
        """Length of the stage that `step` lies in; the last one may be shorter."""
        if not self.every:
            return self.steps
        return min(self.every, self.steps - self.stage(step) * self.every)

    def swap_due(self, steps_done: int) -> bool:
        return self.every is not None and steps_done % self.every == 0


def due_every(interval: int, steps_done: int, at_end: bool, steps: int) -> bool:
    """Every `interval` steps (0: never), and after the last one where `at_end`."""
    return (interval > 0 and steps_done > 0 and steps_done % interval == 0) or (at_end and steps_done == steps)
