"""Cost of a table or figure before anything starts: steps, evaluations, memory, GPU hours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from owpo_megatron.config import Config, SetConfig, hf_folder
from owpo_megatron.evaluation.sets import resolve
from owpo_megatron.families import HFModel, read_hf_config
from owpo_megatron.plan import make_plan
from owpo_megatron.plan.hours import Assumptions, generation_seconds, gpu_hours
from owpo_megatron.reproduce.execute import Reproduction
from owpo_megatron.reproduce.scores import wanted_after


@dataclass(frozen=True)
class RunCost:
    """A run's line of the estimate."""

    label: str
    method: str
    reference: str
    steps: int
    evaluations: int  # that the run makes itself
    gib: float | None  # on each GPU of the trainer; None on CPUs
    fits: bool
    hours: float | None  # of all GPUs; None on CPUs
    finished: bool


@dataclass(frozen=True)
class Estimate:
    """Cost of all runs, and of the evaluations after them."""

    runs: list[RunCost]
    evaluations: list[tuple[str, int, int]]  # (set, checkpoints, responses for each)
    evaluation_hours: float | None
    guess: Assumptions

    @property
    def lines(self) -> list[str]:
        """Totals and assumptions, as text."""
        left = [one for one in self.runs if not one.finished]
        steps = sum(one.steps for one in left)
        lines = [f"{len(self.runs)} runs, {len(left)} to train: {steps:,} steps"]
        drawn = [f"{name} at {count} checkpoints ({each:,} responses each)" for name, count, each in self.evaluations]
        lines.append(f"evaluations afterwards: {', '.join(drawn) or 'none'}")
        if self.evaluation_hours is not None:
            trained = sum(one.hours or 0.0 for one in left)
            lines.append(
                f"GPU hours, a rough estimate: {trained:,.0f} of training, {self.evaluation_hours:,.0f} after it"
            )
            guess = self.guess
            lines.append(
                f"assumed: {guess.gpu}, responses of {guess.length_share:.0%} of the limit, {guess.groups_drawn:g} "
                f"groups drawn per group kept, MFU {guess.mfu:.0%}, {guess.bandwidth_share:.0%} of the bandwidth of "
                "the memory (docs/plan.md); nothing of it was measured on a GPU"
            )
        return lines


def estimate(made: Reproduction, gpu: str, gpu_bytes: int) -> Estimate:
    """Estimate the cost of a table or figure; reads the model's config.json and nothing else.

    At the scale of two cores not even that: the base model may be made later.

    Raises:
        UserError: the model's folder is missing or its shape does not fit the configuration.
    """
    guess, on_gpus = Assumptions(gpu=gpu), made.recipe.scale == "paper"
    model = read_hf_config(hf_folder(made.recipe.run.model.path)) if on_gpus else None
    costs = [_cost(made, index, model, gpu_bytes, guess) for index in range(len(made.runs))]
    responses = {name: _responses(made.recipe.sets[name]) for name in made.artefact.sets}
    after = [
        (made.recipe.titles[name], sum(len(one.places) for one in wanted if name in one.sets), responses[name])
        for wanted in [wanted_after(made.rows, made.artefact.columns)]
        for name in made.artefact.sets
        if any(name in one.sets for one in wanted)
    ]
    hours = _hours(made.recipe.run, model, gpu_bytes, guess, after) if model else None
    return Estimate(costs, after, hours, guess)


def evaluation_steps(config: Config) -> list[int]:
    """Steps after which a run evaluates itself: every so many, before and after, and at the end of a stage."""
    wants, steps = config.eval, config.optimizer.steps
    found = {0} if wants.before else set()
    if wants.every:
        found |= set(range(wants.every, steps + 1, wants.every))
    if wants.after:
        found.add(steps)
    if config.reference.refresh == "best_of_stage":
        found |= set(range(config.reference.every, steps + 1, config.reference.every))
    return sorted(found)


def _cost(made: Reproduction, index: int, model: HFModel | None, gpu_bytes: int, guess: Assumptions) -> RunCost:
    run = made.runs[index]
    config, steps = run.config, evaluation_steps(run.config)
    gib, fits, hours = None, True, None
    if model is not None:
        plan = make_plan(config, gpu_bytes, model, cuda=True)
        each = sum(_responses(one) for one in config.eval.sets)
        gib, fits = plan.used / 2**30, plan.problem is None
        hours = gpu_hours(config, model, gpu_bytes, [each] * len(steps), guess).total
    reference = "its own base" if config.reference.refresh == "fixed" else "none"
    if run.reference is not None:
        reference = f"{'best' if run.weights == 'best' else 'suboptimal'} of {run.reference.label}"
    elif config.algorithm.name == "dapo":
        reference = "none"
    return RunCost(
        run.label, config.algorithm.name, reference, config.optimizer.steps, len(steps),
        gib, fits, hours, run.is_done(made.root),
    )  # fmt: skip


def _responses(wanted: SetConfig) -> int:
    spec = resolve(wanted)
    count = spec.limit or spec.problems
    if count is None:
        count = len(Path(wanted.source or "").read_text().splitlines())
    return count * spec.samples


def _hours(
    config: Config, model: HFModel, gpu_bytes: int, guess: Assumptions, after: Sequence[tuple[str, int, int]]
) -> float:
    gpus = (config.launch.nodes + config.launch.engine_nodes) * max(config.launch.gpus_per_node, 1)
    seconds = (count * generation_seconds(config, model, gpu_bytes, each, guess) for _, count, each in after)
    return sum(seconds) * gpus / 3600
