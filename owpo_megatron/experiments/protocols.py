"""The paper's two protocols, as comparisons of a fixed form.

Two-stage (section 5.1): train DAPO, take its best validation checkpoint as a fixed reference, train every
reference-guided method from the base model.

Iterative self-evolution (section 5.3): start from a suboptimal prior; at the end of every stage the best policy of the
stage becomes the reference, and the number of active samples is reset to the group's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from owpo_megatron.config.file import Section
from owpo_megatron.experiments.lab import Arm, Fields, Lab, ReferenceRun, Setting, built, with_fields


class Protocol(Section):
    """Settings of both protocols."""

    name: str
    out_dir: Path = Path("runs")
    """Parent folder; all files go to out_dir/name, as in a comparison."""
    run: dict[str, Any]
    """Configuration of a run, as for `owpo train`."""
    methods: list[Arm] = Field(min_length=1)
    """Methods to train; the first is compared with the others."""
    seeds: list[int] = Field([1], min_length=1)
    metric: str = "pass@1"
    """Score to report; checkpoints are chosen by Pass@1."""
    equal_compute: bool = True
    """Also run methods without the trained reference longer, by its steps, for the column "equal compute"."""
    workers: int | None = Field(None, gt=0)
    """Concurrent runs; default: one per core on a CPU, one on CUDA."""

    def _lab(self, setting: str, run: dict[str, Any], methods: Sequence[Arm], reference: ReferenceRun) -> Lab:
        fields = {
            "name": self.name,
            "out_dir": self.out_dir,
            "run": run,
            "methods": [Arm(**arm.model_dump(include=set(Arm.model_fields))) for arm in methods],
            "seeds": self.seeds,
            "metric": self.metric,
            "equal_compute": self.equal_compute,
            "reference": reference,
            "regimes": {setting: Setting()},
            "workers": self.workers,
        }
        return built(Lab, fields)


class FirstStage(ReferenceRun):
    """Run whose best checkpoint is the reference."""

    steps: int = Field(400, gt=0)
    weights: Literal["best"] = "best"


class TwoStage(Protocol):
    """Two stages: train the reference, then every method guided by its best checkpoint."""

    name: str = "two-stage"
    methods: list[Arm] = [Arm(label=name, method=name) for name in ("owpo", "mopd", "opd", "sym_dapo", "dapo")]
    first: FirstStage = FirstStage()
    """Run of the first stage; DAPO by default."""

    def lab(self) -> Lab:
        return self._lab("two-stage", self.run, self.methods, self.first)


class EvolvingArm(Arm):
    """A method with a number of iterations of its own."""

    iterations: int | None = Field(None, gt=0)
    """Stages of this method; null: as many as the others."""


class SelfEvolution(Protocol):
    """Stages of `stage_steps` steps, each with the best policy of the previous one as its reference."""

    name: str = "self-evolution"
    methods: list[EvolvingArm] = [EvolvingArm(label=name, method=name) for name in ("owpo", "mopd", "dapo")]  # type: ignore[assignment]
    prior: ReferenceRun = ReferenceRun(steps=100)
    """Run that trains the first reference, a suboptimal policy."""
    iterations: int = Field(4, gt=0)
    stage_steps: int = Field(80, gt=0)
    restart_policy: bool = False
    """Start every stage from its reference with a fresh optimizer, instead of from the last policy."""

    def lab(self) -> Lab:
        stages: Fields = {
            "reference.refresh": "best_of_stage",
            "reference.every": self.stage_steps,
            "reference.restart_policy": self.restart_policy,
        }
        methods = [arm.model_copy(update={"set": stages | self._own_steps(arm) | arm.set}) for arm in self.methods]
        draft = self._lab("self-evolution", self.run, methods, self.prior)
        run = with_fields(draft.base_run(), {"optimizer.steps": self.iterations * self.stage_steps})
        return draft.model_copy(update={"run": run.model_dump(mode="json", exclude_defaults=True)})

    @property
    def most_iterations(self) -> int:
        """Stages of the method that has most of them."""
        return max(getattr(arm, "iterations", None) or self.iterations for arm in self.methods)

    def _own_steps(self, arm: Arm) -> Fields:
        assert isinstance(arm, EvolvingArm)
        return {"optimizer.steps": arm.iterations * self.stage_steps} if arm.iterations else {}


def best_of_stages(curve: list[list[float]], stage_steps: int) -> list[float]:
    """Return the best score among each stage's evaluations, stage by stage.

    Example:
        >>> best_of_stages([[0, 0.1], [5, 0.3], [10, 0.2], [15, 0.4], [20, 0.5]], 10)
        [0.3, 0.5]
    """
    best: dict[int, float] = {}
    for step, score in curve:
        if step > 0:
            stage = (int(step) - 1) // stage_steps
            best[stage] = max(score, best.get(stage, score))
    return [best[stage] for stage in sorted(best)]
