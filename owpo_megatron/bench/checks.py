"""owpo bench checks: the cost of a run's checks and of its checkpoints, as a share of the step that they belong to."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from owpo_megatron.bench.random_model import num_parameters, random_model, random_weights
from owpo_megatron.config import ChecksConfig, ModelConfig, OptimizerConfig, ParallelConfig, ReferenceConfig
from owpo_megatron.engine.answers import Expected, read_answers
from owpo_megatron.mcore.topology import close_topology, init_topology
from owpo_megatron.methods import make_method
from owpo_megatron.policy import MegatronPolicy
from owpo_megatron.run.checkpoints import CheckpointFolder
from owpo_megatron.run.heartbeat import Pulse, Pulses, write_pulse
from owpo_megatron.trainer.checks import StepChecks
from owpo_megatron.types import Prompt, Sample, SampleRequest, Sampling

LENGTH = 64  # tokens of a response


def bench_checks(
    params: int, tokens: int = 4096, rounds: int = 5, every: int = 20, log: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Time an update of the policy, all checks of a step, and a checkpoint, in turns, in one process.

    The step is one update alone: generation, grading and further passes make a run's step longer and the shares
    smaller. The checks are those of every step: all answers of the engine, the line of metrics, the digest of the
    weights, and a tick of the watchdog every five seconds. The test of the gradient's norm is part of the update. A
    checkpoint is saved, hashed and put in place every `every` steps: `save` while nothing else is done; `held` is what
    is left where it is written beside training, `beside` that and what it slows down the updates of that time by.

    Args:
        params: approximate number of parameters of the random model, float32.
        tokens: response tokens of a step.
        rounds: interleaved measurements; results are medians.

    Raises:
        UserError: `params` is too small for a model.
    """
    with TemporaryDirectory(prefix="owpo-bench-") as folder:
        model = random_model(params, Path(folder))
        save_file(dict(random_weights(model, torch.float32)), Path(folder) / "model.safetensors")
        topology = init_topology(ParallelConfig(), seed=0)
        try:
            log("building the model")
            policy = MegatronPolicy(
                ModelConfig(path=Path(folder)),
                ParallelConfig(),
                OptimizerConfig(tokens_per_microbatch=2048),
                ReferenceConfig(),
                model,
                topology,
            )
            row = _measure(policy, Path(folder), tokens, rounds, every, log)
        finally:
            close_topology()
    return {"parameters": num_parameters(model), "tokens": tokens, "rounds": rounds, "every": every} | row


def _measure(
    policy: MegatronPolicy, folder: Path, tokens: int, rounds: int, every: int, log: Callable[[str], None]
) -> dict[str, Any]:
    draw = random.Random(0)
    samples = [_sample(draw, index) for index in range(tokens // LENGTH)]
    requests = [
        SampleRequest(Prompt(str(index), tuple(sample.prompt_ids), "", ""), index)
        for index, sample in enumerate(samples)
    ]
    answers = [_answer(sample) for sample in samples]
    judge = StepChecks(ChecksConfig(), 0.01, lambda verdicts: None, report=log)
    pulses, checkpoints = Pulses(folder, range(1)), CheckpointFolder(folder / "checkpoints", keep=1)
    method = make_method("owpo")
    step = 0

    def update() -> None:
        policy.update(samples, method)

    def check() -> None:
        read_answers(answers, requests, Sampling(LENGTH), Expected(policy.hf.vocab_size, 1))
        policy.weights_digest()
        line = {"step": 2, "updates": 1, "grad_norm": 0.5, "mismatch": 1e-6, "policy_version": 1, "loss": 0.1}
        judge.step(line | judge.of(line))

    def tick() -> None:
        write_pulse(folder, 0, Pulse(step, step, step, "update", 300.0))
        pulses.look()

    def save() -> None:
        nonlocal step
        step += 1
        checkpoints.start(step)
        policy.save(checkpoints.state_path(step))
        checkpoints.finish(step, {"step": step})

    def save_beside() -> tuple[float, int]:
        """Seconds in which nothing was trained, and the updates that were made meanwhile."""
        nonlocal step
        step += 1
        begin = time.perf_counter()
        checkpoints.start(step)
        writing = policy.begin_save(checkpoints.state_path(step))
        checkpoints.describe(step, {"step": step})
        held, updates = time.perf_counter() - begin, 0
        while not writing.ready():
            update()
            updates += 1
        begin = time.perf_counter()
        checkpoints.complete(step, writing.finish())
        return held + time.perf_counter() - begin, updates

    for action in (update, check, tick, save, save_beside):
        action()  # touches memory
    times: dict[str, list[float]] = {}
    for number in range(rounds):
        log(f"round {number + 1} of {rounds}")
        for name, action in (("update", update), ("check", check), ("tick", tick), ("save", save)):
            begin = time.perf_counter()
            action()
            times.setdefault(name, []).append(time.perf_counter() - begin)
        begin = time.perf_counter()
        held, updates = save_beside()
        times.setdefault("held", []).append(held)
        times.setdefault("beside", []).append(time.perf_counter() - begin - updates * times["update"][-1])
    shutil.rmtree(folder / "checkpoints")
    found = {name: statistics.median(values) for name, values in times.items()}
    checks = found["check"] + found["tick"] * found["update"] / 5.0
    return {
        "update_ms": 1e3 * found["update"],
        "checks_ms": 1e3 * checks,
        "save_ms": 1e3 * found["save"],
        "held_ms": 1e3 * found["held"],
        "beside_ms": 1e3 * found["beside"],
        "checks_percent": 100 * checks / found["update"],
        "save_percent": 100 * found["save"] / every / found["update"],
        "held_percent": 100 * found["held"] / every / found["update"],
        "beside_percent": 100 * found["beside"] / every / found["update"],
        "percent": 100 * (checks + found["save"] / every) / found["update"],
    }


def _sample(draw: random.Random, index: int) -> Sample:
    prompt, response = [tuple(draw.randrange(2, 8192) for _ in range(length)) for length in (16, LENGTH)]
    return Sample(
        prompt,
        response,
        draw.choice([-1.0, 1.0]),
        True,
        tuple(-9.0 for _ in response),
        group=index // 8,
        ref_is_old=True,
    )


def _answer(sample: Sample) -> dict[str, Any]:
    pairs = [list(pair) for pair in zip(sample.behaviour_logp, sample.response_ids, strict=True)]
    meta = {"output_token_logprobs": pairs, "finish_reason": {"type": "length"}, "weight_version": "1"}
    return {"output_ids": list(sample.response_ids), "meta_info": meta}
