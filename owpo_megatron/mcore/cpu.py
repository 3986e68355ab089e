"""Run the stock megatron-core on a CPU with gloo; the only place that adapts it.

megatron-core 0.16.1 names "cuda" literally in a few places. Without CUDA, `install()` does five things:

1. `torch.cuda.current_device` returns the CPU and `torch.cuda.synchronize` does nothing;
2. the name `torch` inside megatron's schedules is a proxy whose `zeros` ignores device="cuda"
   (`total_num_tokens` in the three forward_backward functions);
3. recomputation of activations finds no CUDA random state to save;
4. the token dispatcher of experts creates no CUDA stream and passes split sizes to all-to-all as a list;
5. parameters are gathered bucket by bucket: gloo's coalesced all-gather corrupts memory when several are under way.

Without Transformer Engine, on any device, it defines the name that megatron's router looks up before it falls back, and
corrects the flag by which latent attention looks for Transformer Engine.

With neither Transformer Engine nor apex, on any device, it also fixes how the distributed optimizer saves and loads the
state of torch's AdamW, the fallback: megatron copies every state key, including `step`, and shares one `step` tensor
among all parameters, so that after a resume Adam would count n_params steps per update.

On any device it also fixes what the distributed optimizer saves where gradients are in several buckets (overlapped
reductions; an embedding that two stages share): megatron leaves the gaps between buckets out and looks parameters up as
if they were there, so that the state of all but the first bucket is another parameter's.

`scope()` is a TorchFunctionMode for the few calls that need more (model construction, optimizer construction and step,
checkpoint save and load). A global mode would double the time of a tiny step and is not active inside backward. A test
fails when a symbol used here moves; megatron-core is pinned for that reason.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch.distributed.distributed_c10d import _CoalescingManager
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode


def on_cpu() -> bool:
    """Whether this process computes on the CPU."""
    return not torch.cuda.is_available()


def device() -> torch.device:
    """Return the device that this rank computes on."""
    return torch.device("cpu") if on_cpu() else torch.device("cuda", torch.cuda.current_device())


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites device="cuda", pin_memory, Tensor.cuda() and type names in calls inside the scope."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        name = getattr(func, "__name__", "")
        if name == "cuda" and args and isinstance(args[0], torch.Tensor):
            return args[0]
        if name == "to":
            args = tuple("cpu" if _names_cuda(arg) else arg for arg in args)
        out = func(*args, **kwargs)
        if name == "type" and isinstance(out, str) and not out.startswith("torch.cuda"):
            # the optimizers sort parameters by this name and know only the CUDA ones
            return out.replace("torch.", "torch.cuda.", 1)
        return out


class _TorchWithoutCudaZeros:
    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, device="cpu" if _names_cuda(device) else device, **kwargs)


def _names_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Context for model and optimizer construction, optimizer.step, checkpoint save and load; a no-op with CUDA."""
    if on_cpu():
        with _CudaMeansCpu():
            yield
    else:
        yield


def scoped(function: Any) -> Any:
    """Decorate a function to run inside `scope`."""

    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with scope():
            return function(*args, **kwargs)

    return inside


@functools.cache
def install() -> None:
    """Apply the adaptations to this process. Call before any model is built."""
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _repair_torch_adamw_state()
    _repair_state_of_buckets()
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # megatron tests it for None but imports it only with Transformer Engine
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False  # True without it, with a mock for TELinear that isinstance() refuses
    if not on_cpu():
        return
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None  # type: ignore[assignment]
    schedules.torch = _TorchWithoutCudaZeros()
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.empty(0)
    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None
    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = (
        object()
    )  # the constructor would create one if it were None; never used
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _splits_on_host
    param_and_grad_buffer._ParamAndGradBucketGroup.start_param_sync = _gather_bucket_by_bucket


def _splits_on_host(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
    """Convert split sizes to lists of int for all_to_all_single; megatron copies them on a side stream, to numpy."""
    if point == self.cuda_dtoh_point:
        for name, form in (("input_splits", "tolist"), ("output_splits", "tolist"), ("output_splits_tp", "numpy")):
            value = getattr(self, name)
            setattr(self, name, getattr(value, form)() if isinstance(value, torch.Tensor) else value)
    return tokens_per_expert


def _gather_bucket_by_bucket(self: Any, force_sync: bool = False) -> None:
    """Gather as megatron's own `start_param_sync` does, by one all-gather per bucket in place of a coalesced one."""
    if force_sync and self.param_gather_handle is not None:
        self.param_gather_handle.wait()
        self.param_gather_handle = None
        return
    assert self.param_gather_handle is None
    late = self.ddp_config.overlap_param_gather and not force_sync
    works = _CoalescingManager()
    size, rank = self.intra_distributed_optimizer_instance_size, self.intra_distributed_optimizer_instance_rank
    group = self.intra_distributed_optimizer_instance_group
    for bucket in self.buckets:
        share = bucket.param_data.chunk(size)[rank]
        works.append(torch.distributed.all_gather_into_tensor(bucket.param_data, share, group, late))
    self.param_gather_handle = works if late else None
    self.param_gather_dispatched = True


def _repair_torch_adamw_state() -> None:
    stock_get = DistributedOptimizer._get_main_param_and_optimizer_states
    stock_load = DistributedOptimizer.load_state_dict

    def get_without_step(self: Any, model_param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        return {key: value for key, value in stock_get(self, model_param).items() if key != "step"}

    @torch.no_grad()
    def set_without_step(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        for key, target in get_without_step(self, model_param).items():
            target.copy_(tensors[key])

    def load_with_own_steps(self: Any, state_dict: dict[str, Any]) -> None:
        stock_load(self, state_dict)
        if not getattr(self, "is_stub_optimizer", False):
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

    DistributedOptimizer._get_main_param_and_optimizer_states = get_without_step
    DistributedOptimizer._set_main_param_and_optimizer_states = set_without_step
    DistributedOptimizer.load_state_dict = load_with_own_steps


def _repair_state_of_buckets() -> None:
    stock = DistributedOptimizer.get_parameter_state_dp_zero

    def at_their_places(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = stock(self, *args, **kwargs)  # None on a rank that is not to save it
        for index, buffer in enumerate(self.buffers if state is not None else ()):
            sizes = [(bucket.numel_unpadded, bucket.grad_data.numel()) for bucket in buffer.buckets]
            if all(unpadded == padded for unpadded, padded in sizes[:-1]):
                continue
            for tensors in state[index].values():
                for name in ("param", "exp_avg", "exp_avg_sq"):
                    parts = tensors[name].split([unpadded for unpadded, _ in sizes])
                    gaps = [padded - unpadded for unpadded, padded in sizes]
                    tensors[name] = torch.cat([pad(part, (0, gap)) for part, gap in zip(parts, gaps, strict=True)])
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = at_their_places


def prime_adamw(optimizer: Any) -> None:
    """Initialise torch AdamW's state to zero before a loading state dict is built; megatron asserts that it exists."""
    for chained in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = chained.optimizer
        if not isinstance(inner, torch.optim.AdamW | torch.optim.Adam):
            continue  # TE's and apex's FusedAdam initialise their own
        for group in inner.param_groups:
            for param in group["params"]:
                if not inner.state[param]:
                    inner.state[param].update(
                        step=torch.tensor(0.0), exp_avg=torch.zeros_like(param), exp_avg_sq=torch.zeros_like(param)
                    )
