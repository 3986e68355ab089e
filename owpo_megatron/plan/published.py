"""Published step times of another system for the paper's model and data, beside simulated ones.

verl's page about its fully asynchronous trainer (https://verl.readthedocs.io/en/latest/advance/fully_async.html,
"Asynchronous Training on 7B Model", read 2026-11-29): Qwen2.5-Math-7B on DAPO-Math-17k, 512 prompts of 16 responses
of up to 28 k tokens, updates of 32 prompts, FSDP2 with sequences split over 4 GPUs, engines of 4 GPUs, H20. Its
scripts are the source of the layout (fully_async_policy/shell/dapo_7b_math_fsdp2_*.sh). The lengths of the responses
are not published, and change in the course of the runs: the 32-GPU run in turns took 494 s per step for its first
hundred and 1,142 for its last, the 64-GPU run 373 throughout.

Three constants are fitted to the first row alone; the others are predictions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from owpo_megatron.config import Config
from owpo_megatron.families import HFModel
from owpo_megatron.plan.lengths import lengths_of
from owpo_megatron.plan.machine import Machine
from owpo_megatron.plan.simulate import Cluster, Simulated, simulate

Part = Literal["all", "first 100"]
PARTS: tuple[Part, ...] = ("all", "first 100")
MFU = 0.5
"""Assumed, as the FLOPs of an H20 are few for its bandwidth; the fit of lengths takes it as given."""
AT_THE_LIMIT = 3.17
"""Assumed: standard deviations of log length from the median to the limit, which one response in 1,300 reaches."""


@dataclass(frozen=True)
class Row:
    """Seconds of a step as published, means of 400 steps; `old_logp` is None where the engines' log-probs are used."""

    shared: bool
    gpus: int
    step: float
    generation: float  # that the trainer waited for
    old_logp: float | None
    update: float
    hundred: float = 0.0  # of each of the first hundred steps, evaluations included: the total time by a hundred

    def of(self, part: Part) -> Row:
        """The row of a part of the run. Phases of the first hundred steps are not published: the run's shares are
        taken."""
        share = 1.0 if part == "all" else self.hundred / self.step
        old = None if self.old_logp is None else self.old_logp * share
        return replace(
            self, step=self.step * share, generation=self.generation * share, old_logp=old, update=self.update * share
        )


ROWS = (
    Row(True, 32, 790.10, 357.41, 107.71, 269.80, 494.4),  # 13 h 44 min
    Row(True, 64, 365.28, 150.72, 70.26, 133.41, 373.2),  # 10 h 22 min
    Row(True, 128, 356.30, 177.85, 53.92, 113.81, 309.6),  # 8 h 36 min
    Row(False, 32, 294.77, 21.26, None, 313.81, 286.8),  # 7 h 58 min
    Row(False, 64, 189.26, 28.46, None, 156.98, 178.2),  # 4 h 57 min
    Row(False, 128, 150.63, 33.14, None, 113.16, 115.8),  # 3 h 13 min
)


@dataclass(frozen=True)
class Fitted:
    """The three constants: the median of the responses' lengths, and two of the machine (decoding, log-probs)."""

    median: float  # tokens
    machine: Machine

    def lengths(self, most: int) -> str:
        """The distribution of the lengths, as `lengths_of` reads it."""
        return f"lognormal:{round(self.median)},{math.log(most / self.median) / AT_THE_LIMIT:.3f}"


@dataclass(frozen=True)
class Compared:
    row: Row
    simulated: Simulated
    fitted: bool
    most: int  # tokens of the longest response

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


def simulate_row(config: Config, model: HFModel, fitted: Fitted, row: Row) -> Simulated:
    """The row's run: in turns on all GPUs, or each half for itself with a stream of responses, at most a step ahead."""
    cluster = Cluster(row.gpus, row.gpus, True) if row.shared else Cluster(row.gpus // 2, row.gpus // 2, False)
    most = config.rollout.max_response_tokens
    draw, bound = lengths_of(fitted.lengths(most), most), 0 if row.shared else 1
    old = row.old_logp is not None
    return simulate(config, model, fitted.machine, cluster, draw, bound, steps=3, old_pass=old, streams=not row.shared)


def fit(config: Config, model: HFModel, row: Row) -> Fitted:
    """The three constants with which this row's generation, log-probs and update come out."""
    assert row.old_logp is not None
    fitted = Fitted(600.0, Machine("H20", memory=96 * 10**9, mfu=MFU, decoding=0.3))
    for _ in range(8):
        found, machine = simulate_row(config, model, fitted, row), fitted.machine
        decoding = machine.decoding * found.generation_seconds / row.generation
        logprobs = machine.logprobs * row.old_logp / found.seconds["old_logp"]
        # the mean length grows about as the median to the power of 2 / 3, since the limit stays where it is
        median = fitted.median * (row.update / found.seconds["update"]) ** 1.5
        fitted = Fitted(median, replace(machine, decoding=decoding, logprobs=logprobs))
    return fitted


def compare(config: Config, model: HFModel, part: Part) -> tuple[Fitted, list[Compared]]:
    """Fit the first row's part of the run, simulate all."""
    ours = as_published(config)
    rows = [row.of(part) for row in ROWS]
    fitted = fit(ours, model, rows[0])
    most = ours.rollout.max_response_tokens
    return fitted, [Compared(row, simulate_row(ours, model, fitted, row), row is rows[0], most) for row in rows]
