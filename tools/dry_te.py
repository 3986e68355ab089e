"""Transformer Engine's layers, constructed by a process without a GPU, beside megatron-core's local ones.

    python tools/dry_te.py MODEL [MODEL ...] [--layout TP,EP ...] [--json FILE]

MODEL is a small Hugging Face folder. The package and its extension for torch are the real ones; torch
answers as on an H100, and what is made for the GPU is made on the CPU. (On the meta device the layers can be
constructed, too, but leave marks on parameters to a later `reset_parameters`.)

For each layout, as rank 0 of a fake process group of 8: the classes of the layers' parts, and for each tensor of a
checkpoint its place there, its dtype and the marks by which gradients are reduced and counted. In a group of one:
weights from the Hugging Face folder, and from a folder that the local layers saved, as they leave for an engine.

Not covered: anything that computes. Forward and backward call CUDA's kernels past torch's dispatcher.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
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
def h100(engine: bool) -> Iterator[None]:
    """Be on a machine that has a GPU, by the answers of torch.cuda.

    Args:
        engine: with Transformer Engine's layers; False: with megatron-core's local ones.
    """
    from owpo_megatron.mcore import cpu, spec

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
        stack.enter_context(mock.patch.object(cpu, "device", lambda: HERE))
        stack.enter_context(mock.patch.object(spec, "HAVE_TRANSFORMER_ENGINE", engine))
        stack.enter_context(_Machine())
        yield


def construct(hf: Any, parallel: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """This rank's chunk, and its place in the topology."""
    from owpo_megatron.mcore.spec import transformer_config
    from owpo_megatron.mcore.topology import init_topology
    from owpo_megatron.mcore.transformer import build_chunks

    topology = init_topology(parallel, 1)
    (chunk,) = build_chunks(hf, transformer_config(hf, parallel, dtype, {}), 1.0)
    return chunk, topology


def described(folder: Path, tp: int, ep: int, engine: bool) -> dict[str, Any]:
    """The parts of a model's layers and its checkpoint's tensors, on rank 0 of 8."""
    from fake_group import joined

    from owpo_megatron.config import ParallelConfig
    from owpo_megatron.families import read_hf_config
    from owpo_megatron.mcore.checkpoint import tensors_of

    parallel = ParallelConfig(tp=tp, ep=ep, etp=1 if ep > 1 else None, dp=WORLD // tp, sp=tp > 1)
    with h100(engine), joined(0, WORLD):
        chunk, _ = construct(read_hf_config(folder), parallel, torch.bfloat16)
        return {
            "parts": sorted({type(one).__name__ for one in chunk.decoder.modules()}),
            "tensors": dict(sorted(_described(tensors_of(chunk, "model."), chunk).items())),
        }


def lost(folder: Path) -> dict[str, list[str]]:
    """Names of tensors that Transformer Engine's layers give to an engine otherwise than the local ones do.

    Returns:
        By where the layers had them from: "hf", the folder itself; "saved", one that the local layers saved.
    """
    from owpo_megatron.config import ParallelConfig
    from owpo_megatron.families import read_hf_config
    from owpo_megatron.mcore import checkpoint
    from owpo_megatron.mcore.topology import close_topology
    from owpo_megatron.mcore.weights import load_model_weights
    from owpo_megatron.policy.leaving import LeavingWeights

    hf, found = read_hf_config(folder), {}
    with tempfile.TemporaryDirectory() as state:
        for engine, kind in ((False, "local"), (True, "saved"), (True, "hf")):
            dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
            try:
                with h100(engine):
                    chunk, topology = construct(hf, ParallelConfig(), torch.float32)
                    if kind == "saved":
                        checkpoint.load_weights(Path(state), [chunk])
                    else:
                        load_model_weights(folder, [chunk], hf, topology)
                    if kind == "local":
                        checkpoint.save_weights(Path(state), [chunk])
                    found[kind] = {
                        name: tensor.clone() for name, tensor in LeavingWeights(hf, [chunk], topology).whole()
                    }
            finally:
                close_topology()
    wanted = found.pop("local")
    return {
        kind: sorted(
            name for name in set(given) | set(wanted)
            if name not in given or name not in wanted or not torch.equal(given[name], wanted[name])
        )
        for kind, given in found.items()
    }  # fmt: skip


def _described(tensors: dict[str, Any], chunk: torch.nn.Module) -> dict[str, Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    params = {one.untyped_storage().data_ptr(): one for one in chunk.parameters()}
    found = {}
    for whole in tensors.values():
        assert isinstance(whole, ShardedTensor | ShardedTensorFactory), whole
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
    parser.add_argument("--layout", nargs="*", default=["1,1", "2,1"], metavar="TP,EP")
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    import transformer_engine.pytorch  # the error of a missing or broken one is its own

    print(f"Transformer Engine {transformer_engine.__version__}, torch {torch.__version__}")
    rows = []
    for model in given.models:
        gone = lost(model)
        rows.append({"model": model.name, "lost": gone})
        print(f"{model.name}: weights that differ: {gone}", flush=True)
        for tp, ep in (map(int, one.split(",")) for one in given.layout):
            engine, local = (described(model, tp, ep, engine) for engine in (True, False))
            rows.append({"model": model.name, "tp": tp, "ep": ep, "engine": engine, "local": local})
            parts = ", ".join(one for one in engine["parts"] if one.startswith("TE"))
            alike = "like" if engine["tensors"] == local["tensors"] else "NOT like"
            print(f"{model.name}, tp {tp}, ep {ep}: {parts}; {len(engine['tensors'])} tensors, {alike} the local "
                  "layers'", flush=True)  # fmt: skip
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tools"))
    main()
