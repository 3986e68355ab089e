"""GPU hours of a run before it is started: an estimate from the configuration, the model's shapes and guesses.

Nothing here was measured on a GPU; `Assumptions` names what is guessed, docs/plan.md has the formulae.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel
from owpo_megatron.families.weights import forward_flops
from owpo_megatron.methods import make_method
from owpo_megatron.plan.engine import engine_memory
from owpo_megatron.plan.machine import GPUS
from owpo_megatron.run.speed import PEAKS

FULL_RECOMPUTATION = 4  # forward passes' worth of an update whose activations are recomputed; else 3


@dataclass(frozen=True)
class Assumptions:
    """Guesses of the estimate. A run's own lines (docs/metrics.md) have the true values."""

    gpu: str = "H100"
    length_share: float = 0.35  # mean response length, of rollout.max_response_tokens
    groups_drawn: float = 1.8  # groups generated for one kept, with dynamic sampling
    prompt_tokens: int = 200
    mfu: float = 0.35  # of the trainer's passes
    bandwidth_share: float = 0.6  # of the engine's memory bandwidth while decoding

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError("--gpu", self.gpu, f"use one of {', '.join(GPUS)}")


@dataclass(frozen=True)
class Hours:
    """GPU hours of a run: GPUs that are reserved times hours, whether they compute or wait."""

    rollouts: float
    updates: float  # with the old and the reference passes
    evaluations: float

    @property
    def total(self) -> float:
        return self.rollouts + self.updates + self.evaluations


def gpu_hours(
    config: Config,
    model: HFModel,
    gpu_bytes: int,
    samples_per_evaluation: Sequence[int],
    guess: Assumptions | None = None,
) -> Hours:
    """Estimate a run's GPU hours.

    Args:
        gpu_bytes: memory of each GPU.
        samples_per_evaluation: responses that each evaluation of the run draws.
    """
    guess = guess or Assumptions()
    roll, launch = config.rollout, config.launch
    gpus = (launch.nodes + launch.engine_nodes) * max(launch.gpus_per_node, 1)
    method = make_method(config.algorithm)
    drawn = guess.groups_drawn if roll.keeps_mixed_groups(method) else 1.0
    samples = roll.prompts_per_step * roll.group_size
    generated = generation_seconds(config, model, gpu_bytes, samples * drawn, guess)
    evaluated = sum(generation_seconds(config, model, gpu_bytes, count, guess) for count in samples_per_evaluation)
    steps = config.optimizer.steps
    hour = gpus / 3600
    return Hours(
        rollouts=steps * generated * hour,
        updates=steps * training_seconds(config, model, samples, guess) * hour,
        evaluations=evaluated * hour,
    )


def generation_seconds(config: Config, model: HFModel, gpu_bytes: int, samples: float, guess: Assumptions) -> float:
    """Seconds in which the run's engines generate this many responses, or the longest of them alone if that is more.

    Decoding is bound by memory: every step of an engine reads its weights and the cache of its batch once.
    """
    memory = engine_memory(config, model, gpu_bytes)
    mean = guess.length_share * config.rollout.max_response_tokens
    batch = max(1.0, min(config.engine.concurrency, memory.tokens / (guess.prompt_tokens + mean)))
    bandwidth = guess.bandwidth_share * GPUS[guess.gpu].memory
    cached = batch * (guess.prompt_tokens + mean / 2) * memory.token
    seconds_per_step = (memory.weights + cached) / bandwidth
    throughput = engines(config) * batch / seconds_per_step
    longest = config.rollout.max_response_tokens * memory.weights / bandwidth
    return max(samples * mean / throughput, longest)


def training_seconds(config: Config, model: HFModel, samples: int, guess: Assumptions) -> float:
    """Seconds of a step's passes over its samples: updates, the old policy's, the reference's."""
    method = make_method(config.algorithm)
    recomputes = config.recomputation.get("recompute_granularity") == "full"
    passes = float(FULL_RECOMPUTATION if recomputes else 3)
    if method.needs_old and config.optimizer.updates_per_step > 1:
        passes += 1
    if method.needs_reference == "active" and config.algorithm.curriculum:
        passes += (config.rollout.group_size + 1) / (2 * config.rollout.group_size)  # G to 1 within a stage
    elif method.needs_reference != "none":
        passes += 1
    length = guess.prompt_tokens + guess.length_share * config.rollout.max_response_tokens
    matmul, attention = forward_flops(model)
    peak = PEAKS[guess.gpu] * guess.mfu * config.parallel.world_size
    return samples * length * passes * (matmul + attention * length) / peak


def engines(config: Config) -> int:
    """Engines that work for the run: its own, or those of the launch's engine nodes."""
    if config.launch.engine_nodes:
        return config.launch.engine_nodes * max(config.launch.gpus_per_node, 1) // config.engine.tp
    return config.engine.count
