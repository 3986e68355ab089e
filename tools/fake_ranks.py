"""Every collective of a step on hundreds of ranks, one rank at a time in one process, without their memory.

Ranks join torch's fake process group, parameters and activations are on the meta device, and the product's own code
builds the topology, computes log-probs, makes an update and exports the weights. `Recorder` notes each operation with
its bytes and the members of its group. `differences` compares ranks of a group: all of them must do the same
operations in the same order, and what one sends another receives. A rank that leaves one out is a run that hangs.

What other ranks would have sent comes from one place, `Recorder.answers` and `_fill`: gathered objects, shapes that a
stage receives; experts are chosen evenly. Not covered: values, time, Transformer Engine's layers (whose tensor-parallel
collectives are megatron-core's as well; context-parallel attention exchanges keys and values in its own way), NCCL.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.fx.experimental._config
from fake_calls import Call, RankRecord
from fake_group import joined
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch._C._distributed_c10d import FakeWork, ProcessGroup
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from owpo_megatron.config import Config, ParallelConfig
from owpo_megatron.families import HFModel
from owpo_megatron.mcore.topology import Topology, init_topology
from owpo_megatron.methods import make_method
from owpo_megatron.policy import MegatronPolicy
from owpo_megatron.types import Sample

aten = torch.ops.aten
_EXPERT = re.compile(r"(?<=local_experts)\.(\d+)\.")
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


class _Adapted(TorchFunctionMode):
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


def _even_routing(self: Any, logits: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every expert as many of a rank's tokens as every other."""
    scores_TE = logits.view(-1, logits.shape[-1]).softmax(-1)
    tokens, experts = scores_TE.shape
    place_TK = torch.arange(tokens * self.topk).view(tokens, self.topk) % experts
    chosen_TE = torch.zeros(tokens, experts, dtype=torch.bool, device="cpu").scatter(1, place_TK, True)
    return scores_TE * chosen_TE, chosen_TE


def record(
    config: Config,
    hf: HFModel,
    rank: int,
    microbatches: int = 2,
    catalogues: dict[tuple[int, int], Any] | None = None,
    update: bool = True,
) -> RankRecord:
    """Build one rank's part, compute log-probs, make an update and, where `catalogues` has them, export the weights.

    Args:
        microbatches: number per data-parallel rank, each with one sample of `optimizer.tokens_per_microbatch` tokens.
        catalogues: parameters of (stage, expert-parallel rank), as `all_catalogues` finds them.
        update: False: only the parameters are listed.
    """
    par = config.parallel
    tokens = config.optimizer.tokens_per_microbatch
    samples = [_sample(tokens)] * (microbatches * par.dp)
    shape = [tokens // par.cp // (par.tp if par.sp else 1), 1, hf.hidden_size]
    begin = time.process_time()
    with contextlib.ExitStack() as stack:
        stack.enter_context(joined(rank, par.world_size))
        recorder = Recorder(shape, catalogues, par)
        patch = mock.patch.object
        stack.enter_context(patch(Topology, "all_gather", lambda self, value: recorder.answers(value)))
        stack.enter_context(patch(Topology, "broadcast", lambda self, value: recorder.answers(value)[0]))
        stack.enter_context(patch(dist, "all_gather_object", recorder.gather_objects))
        stack.enter_context(patch(TopKRouter, "routing", _even_routing))
        stack.enter_context(patch(MegatronPolicy, "load_weights", lambda self, path: None))
        stack.enter_context(patch(torch.fx.experimental._config, "meta_nonzero_assume_all_nonzero", True))
        stack.enter_context(_Adapted())
        stack.enter_context(recorder)
        topology = init_topology(par, config.seed)
        with torch.device("meta"):
            policy = MegatronPolicy(
                config.model, par, config.optimizer, config.reference, hf, topology,
                config.rollout.temperature, config.megatron,
            )  # fmt: skip
        if update:
            recorder.phase = "log-probs"
            policy.logprobs(samples)
            recorder.phase = "update"
            policy.update(samples, make_method(config.algorithm))
        recorder.phase = "weights"
        memory = _memory(policy)
        with contextlib.suppress(StopExport):
            for _ in policy.named_weights():
                pass
        place = {
            "tp": topology.tp_rank, "cp": topology.context.rank, "pp": topology.pp_rank, "dp": topology.dp_rank,
            "ep": topology.ep_rank,
        }  # fmt: skip
        groups = _groups(topology)
    seconds = time.process_time() - begin
    return RankRecord(rank, place, recorder.calls, memory, groups, recorder.catalogue, seconds)


def all_catalogues(config: Config, hf: HFModel) -> dict[tuple[int, int], Any]:
    """Parameters of every (stage, expert-parallel rank): in a stage they differ in their experts' numbers alone."""
    par, found = config.parallel, {}
    for stage in range(par.pp):
        first = record(config, hf, stage * (par.world_size // par.pp), update=False).catalogue
        for ep in range(par.ep):
            more = ep * hf.num_experts // par.ep
            found[stage, ep] = (stage, ep, [(_renumbered(name, more), *of) for name, *of in first[2]])
    return found


def _renumbered(name: str, more: int) -> str:
    return _EXPERT.sub(lambda found: f".{int(found[1]) + more}.", name)


def _groups(topology: Topology) -> dict[tuple[int, ...], str]:
    groups = {
        "all ranks": dist.group.WORLD,
        "embeddings": parallel_state.get_embedding_group(check_initialized=False),
        "pipeline": topology.pp_group,
        "experts' copies": parallel_state.get_expert_data_parallel_group(),
        "experts": parallel_state.get_expert_tensor_and_model_parallel_group(),
        "same parameters": topology.copies_group,
        "context": topology.context.group,
        "tensor": topology.tp_group,
    }
    return {tuple(dist.get_process_group_ranks(group)): name for name, group in groups.items() if group}


def _sample(tokens: int) -> Sample:
    logp = torch.full((tokens // 2,), -1.0)
    return Sample(
        prompt_ids=(1,) * (tokens - tokens // 2),
        response_ids=(2,) * (tokens // 2),
        advantage=1.0,
        active=True,
        behaviour_logp=tuple(logp.tolist()),
        old_logp=logp,
        ref_logp=logp,
    )


def _memory(policy: MegatronPolicy) -> dict[str, int]:
    """Bytes of this rank's buffers after an update, as `owpo plan` counts them."""
    buffers = [b for chunk in policy._chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    states = [one.optimizer for one in getattr(policy._optimizer, "chained_optimizers", [policy._optimizer])]
    kept = {id(tensor): tensor for one in states for state in one.state.values() for tensor in state.values()}
    masters = [
        param for one in states for group in one.param_groups for param in group["params"]
    ] if policy._optimizer.config.bf16 else []  # fmt: skip
    moments = [tensor for tensor in kept.values() if isinstance(tensor, torch.Tensor) and tensor.dim()]
    return {
        "weights": sum(b.param_data.numel() * b.param_data.element_size() for b in buffers),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "optimizer": sum(tensor.numel() * tensor.element_size() for tensor in [*moments, *masters]),
    }


def representatives(parallel: ParallelConfig, copies: int = 2) -> list[int]:
    """Ranks of every place in tp, cp and pp, and so in ep, at the first data-parallel indices."""
    per_stage = parallel.world_size // parallel.pp
    return [
        stage * per_stage + rank
        for stage in range(parallel.pp)
        for rank in range(parallel.tp * parallel.cp * min(copies, parallel.dp))
    ]
