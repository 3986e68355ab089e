"""Published step times of another system for the paper's model and data, beside simulated ones.

verl's page about its fully asynchronous trainer (https://verl.readthedocs.io/en/latest/advance/fully_async.html,
"Asynchronous Training on 7B Model", read 2026-11-29): Qwen2.5-Math-7B on DAPO-Math-17k, 512 prompts of 16 responses
of up to 28 k tokens, updates of 32 prompts, FSDP2 with sequences split over 4 GPUs, engines of 4 GPUs, H20. Its
scripts are the source of the layout (fully_async_policy/shell/dapo_7b_math_fsdp2_*.sh). The lengths of the responses
are not published.

The three constants of `Machine` are fitted to the first row alone; the others are predictions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from owpo_megatron.config import Config
from owpo_megatron.families import HFModel
from owpo_megatron.plan.lengths import lengths_of
from owpo_megatron.plan.machine import Machine
from owpo_megatron.plan.simulate import Cluster, Simulated, simulate

LENGTHS = "lognormal:1200,1.0"
"""Assumed: a mean of about 2,000 tokens, with one response in 1,300 cut at 28 k."""


@dataclass(frozen=True)
class Row:
    """Seconds of a step as published; `old_logp` is None where the engines' log-probs are used."""

    shared: bool
    gpus: int
    step: float
    generation: float  # that the trainer waited for
    old_logp: float | None
    update: float


ROWS = (
    Row(True, 32, 790.10, 357.41, 107.71, 269.80),
    Row(True, 64, 365.28, 150.72, 70.26, 133.41),
    Row(True, 128, 356.30, 177.85, 53.92, 113.81),
    Row(False, 32, 294.77, 21.26, None, 313.81),
    Row(False, 64, 189.26, 28.46, None, 156.98),
    Row(False, 128, 150.63, 33.14, None, 113.16),
)


@dataclass(frozen=True)
class Compared:
    row: Row
    simulated: Simulated
    fitted: bool

    @property
    def error(self) -> float:
        """Difference of the step's time, as a share of the published one."""
        return self.simulated.seconds["total"] / self.row.step - 1


def as_published(config: Config) -> Config:
    """The configuration's model in the published run's sizes: 4 GPUs share a sequence, engines have 4."""
    settings: dict[str, Any] = config.model_dump(exclude_unset=True) | {
        "algorithm": {"name": "dapo"},
        "parallel": {"cp": 4, "recompute": "full"},
        "megatron": {},
        "sglang": {"mem_fraction_static": 0.8},
    }
    for section, values in {
        "rollout": {"prompts_per_step": 512, "group_size": 16, "max_response_tokens": 28672, "dynamic_sampling": False},
        "optimizer": {"updates_per_step": 16, "tokens_per_microbatch": 4 * 2 * 30720},
        "engine": {"tp": 4},
        "data": {"max_prompt_tokens": 2048},
        "launch": {"engine_nodes": 0},
    }.items():
        settings[section] = settings.get(section, {}) | values
    return Config.build(settings)


def simulate_row(config: Config, model: HFModel, machine: Machine, row: Row) -> Simulated:
    """The row's run: in turns on all GPUs, or each half for itself with steps drawn one ahead."""
    cluster = Cluster(row.gpus, row.gpus, True) if row.shared else Cluster(row.gpus // 2, row.gpus // 2, False)
    draw = lengths_of(LENGTHS, config.rollout.max_response_tokens)
    bound = 0 if row.shared else 1
    return simulate(config, model, machine, cluster, draw, bound, steps=3, old_pass=row.old_logp is not None)


def fit(config: Config, model: HFModel, row: Row = ROWS[0]) -> Machine:
    """The three constants with which this row's generation, update and whole step come out."""
    machine = Machine("H20", memory=96 * 10**9, mfu=0.3, decoding=0.3)
    for _ in range(6):  # generation is close to, not exactly, inverse in the share that is reached
        found = simulate_row(config, model, machine, row)
        machine = replace(
            machine,
            decoding=machine.decoding * found.generation_seconds / row.generation,
            mfu=machine.mfu * found.seconds["update"] / row.update,
        )
    rest = simulate_row(config, model, machine, row).seconds["total"]
    return replace(machine, fixed=max(0.0, row.step - rest))


def compare(config: Config, model: HFModel) -> tuple[Machine, list[Compared]]:
    """Fit the first row, simulate all."""
    ours = as_published(config)
    machine = fit(ours, model)
    return machine, [Compared(row, simulate_row(ours, model, machine, row), row is ROWS[0]) for row in ROWS]
