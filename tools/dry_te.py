"""Transformer Engine's layers, constructed by a process without a GPU, beside megatron-core's local ones.

    python tools/dry_te.py MODEL [MODEL ...] [--tp N] [--ep N] [--json FILE]

MODEL is a Hugging Face folder, of which config.json alone is read. The package and its extension for torch are the real
ones; torch is told that it has an H100, and what is made for the GPU is made on the CPU, so that models should be
small. One rank of a fake process group of 8. Written for each model: the classes of its layers' parts, and for each
tensor of a checkpoint its place there, its dtype and the marks by which gradients are reduced and counted. (On the meta
device the layers can be constructed, too, but leave the marks to a later `reset_parameters`.)

Not covered: anything that computes. Forward and backward call CUDA's kernels past torch's dispatcher.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parents[1]
WORLD = 8
HERE = torch.device("cpu")
# What megatron-core sets on parameters, and what it takes for absent ones.
MARKS = {"tensor_model_parallel": False, "sequence_parallel": False, "allreduce": True}


class _Machine(TorchFunctionMode):
    """Tensors for a GPU are made on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = HERE
        name = getattr(func, "__name__", "")
        if name == "cuda" and args and isinstance(args[0], torch.Tensor):
            return args[0]
        if name == "to":
            args = tuple(HERE if _is_cuda(one) else one for one in args)
        return func(*args, **kwargs)


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or getattr(value, "type", None) == "cuda"


@contextlib.contextmanager
def h100(world: int = WORLD) -> Iterator[None]:
    """Be rank 0 of a fake process group, on a machine that says it has a GPU."""
    from fake_group import joined

    card = mock.Mock(major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 8, "get_device_capability": (9, 0), "get_device_properties": card,
        "current_device": HERE, "set_device": None, "synchronize": None, "manual_seed": None, "is_initialized": True,
        "get_rng_state": torch.empty(0), "set_rng_state": None, "current_stream": mock.Mock(), "Stream": mock.Mock(),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        stack.enter_context(mock.patch.dict(os.environ, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}))
        stack.enter_context(joined(0, world))
        stack.enter_context(_Machine())
        yield


def built(folder: Path, tp: int, ep: int, engine: bool) -> dict[str, Any]:
    """The parts of a model's layers and its checkpoint's tensors.

    Args:
        engine: with Transformer Engine's layers; False: megatron-core's local ones.
    """
    from owpo_megatron.config import ParallelConfig
    from owpo_megatron.families import read_hf_config
    from owpo_megatron.mcore import checkpoint, cpu, spec
    from owpo_megatron.mcore.topology import init_topology
    from owpo_megatron.mcore.transformer import build_chunks

    hf = read_hf_config(folder)
    parallel = ParallelConfig(tp=tp, ep=ep, dp=WORLD // tp, sp=tp > 1)
    with (
        h100(),
        mock.patch.object(cpu, "device", lambda: HERE),
        mock.patch.object(spec, "HAVE_TRANSFORMER_ENGINE", engine),
    ):
        init_topology(parallel, 1)
        config = spec.transformer_config(hf, parallel, torch.bfloat16, {})
        (chunk,) = build_chunks(hf, config, 1.0)
        return {
            "parts": sorted({type(one).__name__ for one in chunk.decoder.modules()}),
            "tensors": dict(sorted(_described(checkpoint.tensors_of(chunk, "model."), chunk).items())),
        }


def _described(tensors: dict[str, Any], chunk: torch.nn.Module) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    params = {one.untyped_storage().data_ptr(): one for one in chunk.parameters()}
    found = {}
    for whole in tensors.values():
        if not isinstance(whole, ShardedTensor | ShardedTensorFactory):
            continue  # an extra state of grouped experts, which a checkpoint leaves out
        param = params.get(whole.data.untyped_storage().data_ptr())
        for one in _leaves(whole.build()) if isinstance(whole, ShardedTensorFactory) else [whole]:
            found[f"{one.key} {list(one.global_offset)}"] = {
                "global": list(one.global_shape), "local": list(one.local_shape), "dtype": str(one.dtype),
                "marks": param is not None and {name: getattr(param, name, absent) for name, absent in MARKS.items()},
            }  # fmt: skip
    return found


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for one in tree:
            yield from _leaves(one)
    else:
        yield tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    import transformer_engine.pytorch  # the error of a missing or broken one is its own

    print(f"Transformer Engine {transformer_engine.__version__}, torch {torch.__version__}")
    rows = {}
    for model in given.models:
        rows[model.name] = {
            kind: built(model, given.tp, given.ep, engine) for kind, engine in (("engine", True), ("local", False))
        }
        engine, local = rows[model.name]["engine"], rows[model.name]["local"]
        alike = engine["tensors"] == local["tensors"]
        print(f"{model.name}: {', '.join(one for one in engine['parts'] if one.startswith('TE'))}; "
              f"{len(engine['tensors'])} tensors, {'those' if alike else 'NOT those'} of the local layers")  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tools"))
    main()
