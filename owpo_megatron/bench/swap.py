"""owpo bench swap: the hard swap of the reference against copying the same weights, on a random model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from owpo_megatron.bench.random_model import random_model
from owpo_megatron.config import OptimizerConfig, ParallelConfig
from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel
from owpo_megatron.mcore import cpu
from owpo_megatron.mcore.optimizer import make_optimizer, wrap_ddp
from owpo_megatron.mcore.slots import ParameterSlots
from owpo_megatron.mcore.spec import transformer_config
from owpo_megatron.mcore.topology import close_topology, init_topology
from owpo_megatron.mcore.transformer import build_chunks

_NOTES = {
    "bfloat16": "nothing is copied: the masters are separate",
    "float32": "no separate masters: the optimizer's 1/DP shard of the weights is copied, here (DP 1) all of them",
}
_STEPS = 5  # optimizer steps timed with and without a swap; a step costs far more than a swap


def bench_swap(
    params: int, dtype: str = "bfloat16", rounds: int = 20, log: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Time swaps, from `slots.swap()` until optimizer.step may run, and copies of the same weights.

    A swap adds nothing else to a step, as `step_ms` and `step_with_swap_ms` show. The first swap of a run also
    allocates the second slot (`first_swap_ms`). Call it in a process of its own: it joins and leaves a world of one.

    Args:
        params: approximate number of parameters of the model.
        dtype: "bfloat16" or "float32": whose figures to return at the top; the rows have both.
        rounds: interleaved swaps and copies; results are medians.
        log: called with a line of progress.

    Returns:
        {"swap_ms", "copy_ms", "speedup", "rows": [one per dtype]}. copy_ms is one contiguous copy into memory that was
        touched before, the lower bound for a copying implementation; per_tensor_copy_ms copies parameter by parameter.

    Raises:
        UserError: `params` is too small for a model, or the dtype is another one.
    """
    if dtype not in _NOTES:
        raise UserError("dtype", dtype, f"use one of {', '.join(_NOTES)}")
    with TemporaryDirectory(prefix="owpo-bench-") as folder:
        model = random_model(params, Path(folder))
    init_topology(ParallelConfig(), seed=0)
    try:
        rows = [_measure(model, name, rounds, log) for name in dict.fromkeys((dtype, *_NOTES))]
    finally:
        close_topology()
    return {name: rows[0][name] for name in ("swap_ms", "copy_ms", "speedup")} | {"rows": rows}


def _measure(model: HFModel, dtype_name: str, rounds: int, log: Callable[[str], None]) -> dict[str, Any]:
    log(f"{dtype_name}: building the model")
    dtype = getattr(torch, dtype_name)
    config = transformer_config(model, ParallelConfig(), dtype, {})
    chunks = wrap_ddp(build_chunks(model, config, temperature=1.0), config)
    optimizer = make_optimizer(chunks, OptimizerConfig(), dtype)
    slots = ParameterSlots(chunks, optimizer, "resident")
    buffers = [buffer.param_data for buffer in chunks[0].buffers]
    parameters = [param.detach() for param in chunks[0].parameters()]
    copies, tensor_copies = [data.clone() for data in buffers], [param.clone() for param in parameters]

    def swap() -> None:
        slots.swap()
        slots.before_step()
        assert not slots.aliased

    def step() -> None:
        with cpu.scope():
            optimizer.step()

    def swap_and_step() -> None:
        swap()
        step()

    log(f"{dtype_name}: {rounds} swaps and copies")
    first_swap_ms = _milliseconds(swap)
    swap_ms, copy_ms, per_tensor_copy_ms = _medians(
        rounds, swap, lambda: _copy(copies, buffers), lambda: _copy(tensor_copies, parameters)
    )
    log(f"{dtype_name}: optimizer steps with and without a swap")
    step()  # touches the optimizer's memory
    step_ms, step_with_swap_ms = _medians(min(rounds, _STEPS), step, swap_and_step)
    return {
        "dtype": dtype_name,
        "parameters": sum(param.numel() for param in parameters),
        "tensors": len(parameters),
        "megabytes": round(sum(data.numel() * data.element_size() for data in buffers) / 1e6, 1),
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "swap_ms": swap_ms,
        "copy_ms": copy_ms,
        "per_tensor_copy_ms": per_tensor_copy_ms,
        "speedup": copy_ms / swap_ms,
        "first_swap_ms": first_swap_ms,
        "step_ms": step_ms,
        "step_with_swap_ms": step_with_swap_ms,
        "note": _NOTES[dtype_name],
    }


def _copy(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _medians(rounds: int, *actions: Callable[[], None]) -> list[float]:
    """Return each action's median over interleaved runs, so that background load affects all actions alike."""
    times = [[_milliseconds(action) for action in actions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def _milliseconds(action: Callable[[], None]) -> float:
    torch.cuda.synchronize()  # a no-op on a CPU
    begin = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3
