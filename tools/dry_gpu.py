"""A GPU without a GPU: fake CUDA tensors have shapes and no memory; kernels, host syncs and live bytes are counted.

`with DryGpu() as gpu:` runs code on device "cuda" under torch's FakeTensorMode in a CPU build of torch. Every operation
on such a tensor counts as a kernel, unless it makes a view; every read of one on the host as a synchronisation, with
file and line; every storage as live bytes until it is freed. Triton's launchers run; their kernels are replaced by a
counter. Not covered: autograd's backward, which asks for a device (`torch.autograd.grad` of a method's few vectors is
replaced by empty results; dry_layers.py runs it on meta tensors), time, and what a real kernel refuses.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dry_machine
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

ROOT = Path(__file__).parents[1]
aten = torch.ops.aten
_NO_KERNEL = {  # answered on the host, or memory alone
    torch.ops.prim.device.default, aten.detach.default, aten.empty.memory_format, aten.empty_like.default,
    aten.new_empty.default, aten.empty_strided.default,
}  # fmt: skip
DEVICES = ("cuda", "meta")  # of tensors that stand for a GPU's
HOST_ELEMENTS = 1 << 20  # of a tensor that is made on the host and stays real
LARGE = 32 << 20  # bytes: before storages of this size are added, freed ones are looked for


class DryGpu(TorchDispatchMode):
    """Counters of one dry run.

    Attributes:
        fake: tensors are fake ones on "cuda"; False: they are on the meta device.

    Args:
        kept: fraction of the rows that `nonzero` finds.
        answer: values that the host reads from a tensor (`tolist`, `item`).
    """

    fake = True

    def __init__(self, kept: float = 1.0, answer: Callable[[torch.Tensor], Any] = lambda tensor: 0):
        super().__init__()
        self.kept, self.answer = kept, answer
        self.kernels: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()  # from the host to the device
        self.peak, self.peak_at = 0, "?"
        self.streams = 0
        self._bytes = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._stack = contextlib.ExitStack()

    def start(self) -> int:
        """Begin a phase: counters at zero, the peak at what is live, which is returned."""
        self._forget_freed()
        self.peak = self._bytes
        self.kernels.clear()
        self.syncs.clear()
        self.copies.clear()
        return self._bytes

    @property
    def live(self) -> int:
        self._forget_freed()
        return self._bytes

    def __enter__(self) -> DryGpu:
        dry_machine.let_slices_pass()
        torch._C._ensureCUDADeviceGuardSet()
        for owner, name, value in (*dry_machine.device(self), *(dry_machine.values(self) if self.fake else ())):
            self._stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        if self.fake:
            self._stack.enter_context(self._fake)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    # ------------------------------------------------------------------------------------------ counting
    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if _on_host(args, kwargs):
            with fake_tensor.unset_fake_temporarily():
                return func(*args, **kwargs)
        if self.fake:
            args, kwargs = tree_map(self._as_fake, (args, kwargs))
        on_gpu = _on_gpu((args, kwargs))
        if on_gpu:
            if func is aten._local_scalar_dense.default:
                self.synchronise("item")
                return self.answer(args[0])
            if func is aten.nonzero.default:
                self.synchronise("nonzero")
                return torch.empty(int(len(args[0]) * self.kept), args[0].dim(), dtype=torch.int64, device="cuda")
            if func is aten.index.Tensor:
                args = (args[0], [self._as_rows(index) for index in args[1]])
            if func is aten._to_copy.default and torch.device(kwargs.get("device") or "cuda").type == "cpu":
                self.synchronise("copy to the host")
                return self._read(args[0], kwargs.get("dtype"))
            by_mask = func in (aten.index_put_.default, aten.index_put.default) and any(map(_is_mask, args[1]))
            if by_mask and args[2].numel() > 1:  # one number is filled in without counting the places
                self.synchronise("index_put by a mask")
        self._count_copies(func, args, kwargs)
        if func is aten._scaled_mm.out:  # has no fake form; the other overload checks the operands
            out = kwargs["out"]
            made = aten._scaled_mm.default(*args, **{name: value for name, value in kwargs.items() if name != "out"})
            assert made.shape == out.shape and made.dtype == out.dtype
        else:
            out = func(*args, **kwargs)
        if not func.is_view and func not in _NO_KERNEL and (on_gpu or _on_gpu(out)):
            self.kernels[str(func)] += 1
        self._track(out)
        return out

    def _as_fake(self, value: Any) -> Any:
        real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return self._fake.from_tensor(value) if real else value

    def _read(self, values: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
        """Return what the host gets of a tensor: of a mask the fraction `kept`, zeros of all else."""
        with fake_tensor.unset_fake_temporarily():
            out = torch.zeros(values.shape, dtype=dtype or values.dtype, device="cpu")
            if out.dtype == torch.bool and out.dim():
                out[..., : int(out.shape[-1] * self.kept)] = True
            return out

    def _as_rows(self, index: torch.Tensor | None) -> torch.Tensor | None:
        if not _is_mask(index):
            return index
        assert index is not None and index.dim() == 1
        self.synchronise("index by a mask")
        return torch.zeros(int(len(index) * self.kept), dtype=torch.int64, device=index.device)

    def _count_copies(self, func: Any, args: tuple, kwargs: dict) -> None:
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            source, target = args[0].device.type, torch.device(kwargs["device"]).type
        elif func is aten.copy_.default:
            source, target = args[1].device.type, args[0].device.type
        else:
            return
        if source in DEVICES and target == "cpu":
            self.synchronise("copy to the host")
        elif source == "cpu" and target in DEVICES:
            self.copies[_where()] += 1

    def synchronise(self, what: str) -> None:
        """Count a wait of the host."""
        self.syncs[f"{what} at {_where()}"] += 1

    def _track(self, out: Any) -> None:
        for tensor in tree_iter(out):
            if not _on_gpu(tensor):
                continue
            storage = tensor.untyped_storage()
            known = self._live.get(storage._cdata)
            if known is not None and not known[0].expired():
                continue
            if known is not None:
                self._bytes -= known[1]
            size = storage.nbytes()
            if size >= LARGE:
                self._forget_freed()
            self._live[storage._cdata] = (StorageWeakRef(storage), size)
            self._bytes += size
        if self._bytes > self.peak:
            self._forget_freed()
            if self._bytes > self.peak:
                self.peak, self.peak_at = self._bytes, _where()

    def _forget_freed(self) -> None:
        for key in [key for key, (storage, _) in self._live.items() if storage.expired()]:
            self._bytes -= self._live.pop(key)[1]


def count_triton(gpu: DryGpu) -> None:
    """Replace the head's Triton kernels by counters; what launches them runs, and is checked for what kernels want."""
    from owpo_megatron.head import backend, triton_ops

    class Kernel:
        def __init__(self, name: str):
            self.name = f"triton.{name}"

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*tensors: Any, **_: Any) -> None:
                for tensor in tensors:
                    if isinstance(tensor, torch.Tensor):
                        assert tensor.device.type == "cuda" and tensor.stride(-1) == 1, self.name
                gpu.kernels[self.name] += 1

            return launch

    for name in ("_stats_kernel", "_dlogits_kernel", "_gather_dot_kernel", "_tail_kernel", "_moments_kernel"):
        setattr(triton_ops, name, Kernel(name))
    backend._use_triton = lambda weight_VH, name: weight_VH.is_cuda


def _on_gpu(values: Any) -> bool:
    return any(isinstance(one, torch.Tensor) and one.device.type in DEVICES for one in tree_iter(values))


def _on_host(args: tuple, kwargs: dict) -> bool:
    """Whether this is an operation of real tensors on the host, or makes one that is not as large as a weight."""
    tensors = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.Tensor)]
    devices = [one for one in tree_iter((args, kwargs)) if isinstance(one, torch.device)]
    if any(torch.device(one).type != "cpu" for one in devices):
        return False
    if tensors:
        return all(one.device.type == "cpu" and not isinstance(one, FakeTensor) for one in tensors)
    sizes = args[0] if args and isinstance(args[0], list | tuple) else []
    return bool(devices) and math.prod(one for one in sizes if isinstance(one, int)) <= HOST_ELEMENTS


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool and index.device.type in DEVICES


def _where() -> str:
    """Line of ours, or of megatron's, that is nearest to the operation."""
    for frame in reversed(traceback.extract_stack()):
        if place := _place(frame.filename):
            return f"{place}:{frame.lineno}"
    return "?"


@functools.cache
def _place(file: str) -> str | None:
    """A file of ours or of megatron's below its package; None for other files."""
    for name in ("owpo_megatron", "megatron.core"):
        folder = Path(next(iter(importlib.import_module(name).__path__)))
        if Path(file).is_relative_to(folder):
            return f"{name.replace('.', '/')}/{Path(file).relative_to(folder)}"
    return None
