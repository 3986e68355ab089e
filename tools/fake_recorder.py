"""A rank's operations as they happen, and answers for the ranks that are not there: what fake_ranks.py runs under.

Large tensors are on the meta device, small ones are real: their values decide what a rank does next.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.distributed as dist
from fake_calls import Call
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from owpo_megatron.config import ParallelConfig

aten = torch.ops.aten
_LARGE = 1 << 5  # elements; larger new tensors of floats are made on the meta device
_NEW = {aten.empty.memory_format, aten.zeros.default, aten.ones.default, aten.full.default, aten.empty_strided.default}


class Recorder(TorchDispatchMode):
    """Notes collectives, keeps large tensors on the meta device, and answers for the ranks that are not there."""

    def __init__(self, shape: list[int], catalogues: dict[tuple[int, int], Any] | None, parallel: ParallelConfig):
        super().__init__()
        self.calls: list[Call] = []
        self.phase = "start"
        self._shape, self._catalogues, self._parallel = shape, catalogues, parallel
        self.catalogue: Any = None

    # ------------------------------------------------------------------------------- what others would have sent
    def answers(self, value: Any) -> list[Any]:
        """Objects of all ranks, in rank order, where this rank's is `value`."""
        par = self._parallel
        self.calls.append(Call("object", 0, tuple(range(par.world_size)), None, self.phase))
        if isinstance(value, dict):  # sums of the last stages
            return [{"loss_count": 8.0, "loss_sum": 1.0}]
        if isinstance(value, tuple) and len(value) == 3:  # (stage, ep rank, names) of the parameters
            self.catalogue = value
            if self._catalogues is None:
                raise StopExport
            per_stage = par.world_size // par.pp
            return [
                self._catalogues[rank // per_stage, rank % per_stage // par.expert_tp % par.ep]
                for rank in range(par.world_size)
            ]
        return [value] * par.world_size

    def gather_objects(self, found: list[Any], value: Any, group: Any = None) -> None:
        """The same for megatron-core's own objects, which are alike on all ranks."""
        self.calls.append(Call("all_gather_object", 0, tuple(dist.get_process_group_ranks(group)), None, self.phase))
        found[:] = [value] * len(found)

    # ------------------------------------------------------------------------------------------- operations
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "c10d":
            return self._collective(func, args)
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        if func in _NEW and dtype.is_floating_point and math.prod(args[0]) > _LARGE:
            kwargs["device"] = "meta"
        tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
        if func.__name__.startswith("new_") and tensors[0].is_meta:
            kwargs["device"] = "meta"
        if func is aten._local_scalar_dense.default and tensors[0].is_meta:
            return 1.0 if tensors[0].is_floating_point() else 1
        if func.__name__.startswith(("linalg_vector_norm", "norm.")) and tensors[0].is_meta:
            return torch.ones((), device="cpu")  # megatron-core reads it right away
        if func is aten.masked_select.default and tensors[0].is_meta:
            return tensors[0].new_empty(int(args[1].sum()))
        if func is aten.masked_scatter.default and tensors[0].is_meta:
            return torch.empty_like(tensors[0])
        if func is aten.lift_fresh.default and not tensors[0].is_meta:
            return func(*args)
        if func is aten._to_copy.default and tensors[0].is_meta:
            kwargs["device"] = "meta"  # it stays there
        if any(one.is_meta for one in tensors) and not all(one.is_meta for one in tensors):
            args, kwargs = tree_map(_on_meta, (_without_masks(args), kwargs))
        return func(*args, **kwargs)

    def _collective(self, func: Any, args: tuple) -> Any:
        name = func.__name__.split(".")[0]
        sides = [[one for one in tree_iter(arg) if isinstance(one, torch.Tensor)] for arg in args]
        sizes = [sum(one.numel() * one.element_size() for one in side) for side in sides]
        group = next(ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg))
        members = tuple(dist.get_process_group_ranks(group))
        peer = None
        if name.startswith(("send", "recv")):
            peer = members[next(arg for arg in args if isinstance(arg, int))]
        self.calls.append(Call(name.strip("_"), max(sizes), members, peer, self.phase))
        sides = [side for side in sides if side]
        with torch.no_grad(), contextlib.suppress(IndexError):
            self._fill(name, sides)
        work = FakeWork().boxed()
        return work if len(func._schema.returns) == 1 else (args[0], work)

    def _fill(self, name: str, sides: list[list[torch.Tensor]]) -> None:
        """Give small results the values that all ranks alike would have given them."""
        out = sides[0][0]
        if out.is_meta:
            return
        if name == "recv_" and out.dtype == torch.int64 and out.numel() == 3:
            out.copy_(torch.tensor(self._shape))
        elif name == "_allgather_base_":
            out.view(-1, sides[1][0].numel()).copy_(sides[1][0].reshape(1, -1))
        elif name == "allgather_":
            for one in sides[0]:
                one.copy_(sides[1][0])
        elif name == "alltoall_base_" and not sides[1][0].is_meta:
            out.copy_(sides[1][0])


class Adapted(TorchFunctionMode):
    """Tensors on the meta device call their type as those of the CPU do: megatron-core sorts parameters by it.

    A method's derivative is not computed: it concerns no other rank, and mixes what is real with what is not.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.autograd.grad:
            inputs = args[1] if isinstance(args[1], list | tuple) else [args[1]]
            return tuple(torch.zeros_like(one) for one in inputs)
        if getattr(func, "__name__", "") == "tolist" and args[0].is_meta:
            return torch.ones(args[0].shape, device="cpu").tolist()
        out = func(*args, **(kwargs or {}))
        return out.replace("torch.meta.", "torch.") if isinstance(out, str) else out


class StopExport(Exception):
    """The catalogue of parameters is known; the other ranks' is not."""


def _is_group(arg: Any) -> bool:
    return "ProcessGroup" in str(arg._type())


def _on_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and not value.is_meta:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def _without_masks(value: Any) -> Any:
    """Real masks among the indices, as numbers: their count would be lost on the meta device."""
    if isinstance(value, list | tuple):
        found: list[Any] = []
        for one in value:
            if (
                isinstance(one, torch.Tensor)
                and one.dtype == torch.bool
                and not one.is_meta
                and isinstance(value, list)
            ):
                found.extend(one.nonzero(as_tuple=True))
            else:
                found.append(_without_masks(one))
        return type(value)(found)
    return value
