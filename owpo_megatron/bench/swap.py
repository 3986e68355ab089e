"""What a hard swap of the reference costs, next to copying the same weights, in one process on a random model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from owpo_megatron.config import OptimizerConfig, ParallelConfig
from owpo_megatron.errors import UserError
from owpo_megatron.families import MLP, Attention, HFModel, Norms, Rope, hf_shapes
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
_STEPS = 5  # optimizer steps timed with and without a swap; they cost far more than what is compared


def bench_swap(params: int, dtype: str = "bfloat16", rounds: int = 20) -> dict[str, Any]:
    """Measure a swap, from `slots.swap()` to the moment when optimizer.step may run, and copies of the same weights.

    A swap costs nothing else over a step without one; `step_ms` and `step_with_swap_ms` show it whole. The first swap
    of a run also allocates the second slot (`first_swap_ms`). Call in a process of its own: it joins and leaves a world
    of one.

    Args:
        params: parameters of the model, roughly.
        dtype: bfloat16 or float32, of the figures at the top; the rows have both.
        rounds: swaps and copies, alternating; the medians are given.

    Returns:
        {"swap_ms", "copy_ms", "speedup", "rows": [one a dtype]}. copy_ms is one contiguous copy into memory that was
        touched before, the least that a copying implementation pays; per_tensor_copy_ms goes parameter by parameter.

    Raises:
        UserError: `params` is too small for a model, or another dtype.
    """
    if dtype not in _NOTES:
        raise UserError("dtype", dtype, f"use one of {', '.join(_NOTES)}")
    model = _model_of(params)
    init_topology(ParallelConfig(), seed=0)
    try:
        rows = [_measure(model, name, rounds) for name in dict.fromkeys((dtype, *_NOTES))]
    finally:
        close_topology()
    return {name: rows[0][name] for name in ("swap_ms", "copy_ms", "speedup")} | {"rows": rows}


def _measure(model: HFModel, dtype_name: str, rounds: int) -> dict[str, Any]:
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

    first_swap_ms = _milliseconds(swap)
    swap_ms, copy_ms, per_tensor_copy_ms = _medians(
        rounds, swap, lambda: _copy(copies, buffers), lambda: _copy(tensor_copies, parameters)
    )
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
    """Of each action, taking turns, so that what else the machine does falls on all of them."""
    times = [[_milliseconds(action) for action in actions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def _milliseconds(action: Callable[[], None]) -> float:
    torch.cuda.synchronize()  # nothing on a CPU
    begin = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def _model_of(params: int) -> HFModel:
    """Twelve layers of a Qwen3-like shape whose width gives about this many parameters."""
    width = 64
    while _numel(_shape(width + 8)) <= params:
        width += 8
    smaller, larger = _shape(width), _shape(width + 8)
    if _numel(smaller) > 1.5 * params:
        raise UserError("params", params, f"use at least {_numel(smaller)}")
    return min(smaller, larger, key=lambda model: abs(_numel(model) - params))


def _shape(width: int) -> HFModel:
    heads = max(1, width // 64)
    return HFModel(
        family_name="qwen3",
        num_layers=12,
        hidden_size=width,
        vocab_size=8192,
        max_positions=1024,
        tied=True,
        attention=Attention(num_heads=heads, num_kv_heads=heads, head_dim=64, qk_norm="head"),
        mlp=MLP(3 * width),
        norms=Norms(1e-6),
        rope=Rope(1e6),
    )


def _numel(model: HFModel) -> int:
    return sum(torch.Size(shape).numel() for shape in hf_shapes(model).values())
