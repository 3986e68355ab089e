"""A rank of 64 with a GPU that is not there, whose tensors are on the meta device: what dry_layers.py runs on.

Autograd runs through meta tensors in the calling thread, as it does not through fake CUDA tensors. Collectives of the
fake process group are counted, not done. Fused kernels, attention and RMSNorm are replaced by one count each, and keep
for the backward what the real ones keep.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from dry_gpu import DryGpu
from fake_group import joined
from megatron.core.fusions import fused_bias_swiglu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers as parallel_layers
from megatron.core.transformer.moe import moe_utils, token_dispatcher
from torch._C._distributed_c10d import FakeWork
from torch.overrides import TorchFunctionMode

from owpo_megatron.mcore import attention, cpu, spec

aten = torch.ops.aten
WORLD = 64
META = torch.device("meta")
FUSED = frozenset({"Transformer Engine", "apex", "Triton", "torch.compile"})


class DryLayers(DryGpu):
    """DryGpu's counters over meta tensors; `counts` are what the host reads of a router's choice."""

    fake = False

    def __init__(self, experts: Experts | None):
        super().__init__(answer=lambda tensor: 0)
        self.experts = experts
        self.collectives = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace == "c10d":
            self.collectives += 1
            work = FakeWork().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        if func is aten.masked_select.default and args[0].is_meta:
            assert self.experts
            self.synchronise("masked_select")
            self.kernels[str(func)] += 1
            out = torch.empty(self.experts.copies, dtype=args[0].dtype, device=META)
            self._track(out)
            return out
        return super().__torch_dispatch__(func, types, args, kwargs)

    def count(self, name: str, out: Any) -> Any:
        """Note a kernel that is not run, and its result."""
        self.kernels[name] += 1
        return out


@dataclass(frozen=True)
class Experts:
    """Tokens that go to each expert and rank, when every expert gets as many."""

    copies: int  # of this rank's tokens: one for each chosen expert
    number: int
    ep: int
    tp: int

    def on_host(self, counts: torch.Tensor, as_numpy: bool) -> Any:
        """Values of one of the dispatcher's counts, which its shape and form tell apart."""
        if counts.dim() == 2:  # [tp ep, local experts], of each rank's tokens
            each = self.copies // self.number
        elif not as_numpy:  # [local experts]
            each = self.copies * self.ep * self.tp // self.number
        else:  # [ep], sent to or received from each; [tp], of a neighbour
            each = self.copies // self.ep if len(counts) == self.ep else self.copies
        values = torch.full(counts.shape, each, dtype=torch.int64, device="cpu")
        return values.numpy() if as_numpy else values


class _CudaIsMeta(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = META
        kwargs.pop("pin_memory", None)
        if name == "cuda" and args and isinstance(args[0], torch.Tensor):
            return args[0].to(META)
        if name == "to":
            args = tuple(META if _is_cuda(one) else one for one in args)
        return func(*args, **kwargs)


def _is_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or getattr(value, "type", None) == "cuda"


class _Kernel(torch.autograd.Function):
    """A fused kernel and its backward, each of which counts as one."""

    @staticmethod
    def forward(ctx: Any, gpu: DryLayers, name: str, kept: Sequence[int], make: Callable[..., Any], *given: Any) -> Any:
        ctx.gpu, ctx.name = gpu, name
        ctx.like = [(one.shape, one.dtype) if isinstance(one, torch.Tensor) else None for one in given]
        out = gpu.count(name, make(*given))
        results = out if isinstance(out, tuple) else (out,)
        ctx.save_for_backward(*[(*given, *results)[place] for place in kept])
        ctx.mark_non_differentiable(*[one for one in results if not one.is_floating_point()])
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        ctx.saved_tensors  # noqa: B018
        needed = zip(ctx.like, ctx.needs_input_grad[4:], strict=True)
        grads = [torch.empty(like[0], dtype=like[1], device=META) if wants else None for like, wants in needed]
        return None, None, None, None, *ctx.gpu.count(f"{ctx.name} backward", grads)


def _new(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape or like.shape, dtype=like.dtype, device=META)


def _attended(query: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Results of flash attention, [S, heads, L, head size] in the order of [S, L, ...], and a number per row."""
    return _new(query.transpose(1, 2)).transpose(1, 2), torch.empty(query.shape[:3], device=META)


@contextlib.contextmanager
def machine(gpu: DryLayers, rank: int, fused: bool) -> Iterator[None]:
    """Be one rank of 64 with a GPU, whose tensors are on the meta device."""

    def kernel(name: str, kept: Sequence[int], make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given: _Kernel.apply(gpu, name, kept, make, *given)

    attend = kernel("attention", (0, 1, 2, 3, 4), _attended)
    norm = kernel("rms norm", (0, 1, 3), lambda x, weight: (_new(x), torch.empty(x.shape[:-1], device=META)))
    rope = kernel("rope", (), lambda t: _new(t))
    swiglu = kernel("swiglu", (0,), lambda y: _new(y, *y.shape[:-1], y.shape[-1] // 2))
    weighted = kernel("swiglu", (0, 1), lambda y, w: _new(y, *y.shape[:-1], y.shape[-1] // 2))
    rows = gpu.experts.copies if gpu.experts else 0

    def map_of(tokens: torch.Tensor) -> torch.Tensor:  # of Transformer Engine's permutation: int32 [T, 2 experts + 1]
        assert gpu.experts
        return torch.empty(len(tokens), 2 * gpu.experts.number + 1, dtype=torch.int32, device=META)

    permute = kernel("permute", (4,), lambda t, p, r: (_new(t, rows, t.shape[1]), _new(p, rows), map_of(t)))
    unpermute = kernel("unpermute", (1,), lambda t, m: _new(t, len(m), t.shape[1]))
    sort = kernel("sort", (), lambda t: _new(t))

    patches: list[tuple[Any, str, Any]] = [
        (dist, "all_gather_object", lambda out, value, group=None: out.__setitem__(slice(None), [value] * len(out))),
        (cpu, "device", lambda: META),
        (token_dispatcher.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", None),  # else that of an earlier run
        (attention.F, "scaled_dot_product_attention", lambda q, k, v, **_: attend(q, k, v)[0]),
        (attention.F, "rms_norm", lambda x, shape, weight, eps: norm(x, weight)[0]),
        (torch.cuda, "current_device", lambda: META),
        (spec, "available", lambda: FUSED if fused else frozenset()),
    ]
    if gpu.experts:
        host = gpu.experts.on_host
        patches.append((
            token_dispatcher, "maybe_move_tensor_to_cpu",
            lambda one, as_numpy=False, record_stream=False: host(one, as_numpy) if torch.is_tensor(one) else one,
        ))  # fmt: skip
    if fused:
        wgrad = mock.Mock(wgrad_gemm_accum_fp32=lambda *_: gpu.count("weight gradient into main_grad", None))
        patches += [
            (rope_utils, "fused_apply_rotary_pos_emb_thd", lambda t, *_, **__: rope(t)),
            (parallel_layers, "fused_weight_gradient_mlp_cuda", wgrad),
            (parallel_layers, "_grad_accum_fusion_available", True),
            (fused_bias_swiglu.SwiGLUFunction, "apply", lambda y, *_: swiglu(y)),
            (fused_bias_swiglu.WeightedSwiGLUFunction, "apply", lambda y, weights, *_: weighted(y, weights)),
            (moe_utils, "HAVE_TE", True),
            (moe_utils, "fused_permute", permute),
            (moe_utils, "fused_permute_with_probs", lambda t, p, r, **_: permute(t, p, r)),
            (moe_utils, "fused_unpermute", lambda t, m, **_: unpermute(t, m)),
            (moe_utils, "fused_sort_chunks_by_index", lambda t, *_: sort(t)),
            (moe_utils, "fused_sort_chunks_by_index_with_probs", lambda t, p, *_: (sort(t), sort(p))),
        ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}))
        stack.enter_context(joined(rank, WORLD))
        stack.enter_context(gpu)
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(_CudaIsMeta())
        yield
