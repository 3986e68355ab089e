"""The paper's two protocols, each a comparison of a fixed form.

Two-stage (section 5.1): train DAPO, take its best validation checkpoint as a fixed reference, train every
reference-guided method from the base model.

Iterative self-evolution (section 5.3): start from a suboptimal prior; at the end of every stage the reference becomes
the best policy of the stage, and the number of active samples starts again at the group's size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from owpo_megatron.config.file import Section
from owpo_megatron.experiments.lab import Entry, Fields, Lab, ReferenceRun, Regime, with_fields


class Protocol(Section):
    """What both protocols are told."""

    name: str
    out_dir: Path = Path("runs")
    """Everything goes to out_dir/name, as in a comparison."""
    run: dict[str, Any]
    """An ordinary run, as `owpo train` takes it."""
    methods: list[Entry] = Field(min_length=1)
    """The first one is compared with the others."""
    seeds: list[int] = Field([1], min_length=1)
    metric: str = "pass@1"
    """The evaluation's score that is shown; checkpoints are chosen by Pass@1."""
    workers: int | None = Field(None, gt=0)
    """Runs at a time; None: one a core (CPU), one (CUDA)."""

    def _lab(self, regime: str, run: dict[str, Any], methods: list[Entry], reference: ReferenceRun) -> Lab:
        return Lab(
            name=self.name,
            out_dir=self.out_dir,
            run=run,
            methods=methods,
            seeds=self.seeds,
            metric=self.metric,
            reference=reference,
            regimes={regime: Regime()},
            workers=self.workers,
        )


class FirstStage(ReferenceRun):
    """The run whose best checkpoint is the reference."""

    steps: int = Field(400, gt=0)
    weights: Literal["best"] = "best"


class TwoStage(Protocol):
    """Stage one trains the reference, stage two everything that is guided by its best checkpoint."""

    name: str = "two-stage"
    methods: list[Entry] = [Entry(label=name, method=name) for name in ("owpo", "mopd", "opd", "sym_dapo", "dapo")]
    first: FirstStage = FirstStage()
    """DAPO, unless it says otherwise."""

    def lab(self) -> Lab:
        return self._lab("two-stage", self.run, self.methods, self.first)


class SelfEvolution(Protocol):
    """Stages of `stage_steps` steps, each with the best policy of the one before as its reference."""

    name: str = "self-evolution"
    methods: list[Entry] = [Entry(label=name, method=name) for name in ("owpo", "mopd", "dapo")]
    prior: ReferenceRun = ReferenceRun(steps=100)
    """The suboptimal policy that is the first reference."""
    iterations: int = Field(4, gt=0)
    stage_steps: int = Field(80, gt=0)
    restart_policy: bool = False
    """Every stage starts from its reference, with a fresh optimizer, instead of from the last policy."""

    def lab(self) -> Lab:
        stages: Fields = {
            "reference.refresh": "best_of_stage",
            "reference.every": self.stage_steps,
            "reference.restart_policy": self.restart_policy,
        }
        methods = [entry.model_copy(update={"set": stages | entry.set}) for entry in self.methods]
        draft = self._lab("self-evolution", self.run, methods, self.prior)
        run = with_fields(draft.base_run(), {"optimizer.steps": self.iterations * self.stage_steps})
        return draft.model_copy(update={"run": run.model_dump(mode="json", exclude_defaults=True)})


def best_of_stages(curve: list[list[float]], stage_steps: int) -> list[float]:
    """The best score of each stage's evaluations, stage by stage.

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
