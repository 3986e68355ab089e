"""Replacements of what asks torch for a CUDA device or takes values from one: a machine for dry_gpu.py to run on."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo  # what it imports must exist before functions of torch.cuda are replaced
import torch._inductor.config
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from dry_gpu import DryGpu

Replacement = tuple[Any, str, Any]  # owner, name of its attribute, the new value


def device(gpu: DryGpu) -> Iterator[Replacement]:
    """Yield replacements of what asks for a device; streams and waits are `gpu`'s to count."""

    class Event:
        def synchronize(self) -> None:
            gpu.synchronise("event.synchronize")

    class Stream:
        cuda_stream = 0

        def __init__(self, *_: Any, **__: Any) -> None:
            gpu.streams += 1

        def wait_stream(self, other: Any) -> None: ...
        def wait_event(self, event: Any) -> None: ...
        def synchronize(self) -> None:
            gpu.synchronise("stream.synchronize")

        def record_event(self) -> Event:
            return Event()

    yield fake_tensor, "init_gpu_context", lambda device: None
    yield torch.cuda, "is_available", lambda: True
    yield torch.cuda, "current_device", lambda: torch.device("cuda:0")
    yield torch.cuda, "set_device", lambda device: None
    yield torch.cuda, "device_count", lambda: 8
    yield torch.cuda, "get_device_capability", lambda *_: (9, 0)
    yield torch.cuda, "current_stream", lambda *_: Stream.__new__(Stream)
    yield torch.cuda, "Stream", Stream
    yield torch.cuda, "stream", lambda stream: contextlib.nullcontext()
    yield torch.cuda, "synchronize", lambda *_: gpu.synchronise("cuda.synchronize")
    yield torch.cuda, "manual_seed", lambda seed: None
    yield torch, "_assert_async", lambda *_: None


def values(gpu: DryGpu) -> Iterator[Replacement]:
    """Yield replacements of what takes values from a device, for fake tensors."""

    def tensor(data: Any, *, device: Any = None, **given: Any) -> torch.Tensor:
        made = make(data, **given)
        return made if device is None or torch.device(device).type == "cpu" else made.to(device)

    def grad(outputs: Any, inputs: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(one) for one in (inputs if isinstance(inputs, tuple | list) else [inputs]))

    def tolist(given: torch.Tensor) -> Any:
        if given.device.type == "cuda":
            gpu.synchronise("tolist")
            return gpu.answer(given)
        return real_tolist(given)

    make, real_tolist = torch.tensor, torch.Tensor.tolist
    yield torch, "tensor", tensor
    yield torch.autograd, "grad", grad
    yield FakeTensor, "tolist", tolist


def let_slices_pass() -> None:
    """CUDA's place among c10's device guards gets the CPU's, which does nothing: slices of fake tensors ask for it."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    places = (ctypes.c_void_p * 32).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    places[1] = places[1] or places[0] or places[9]
    assert places[1], "this build of torch has no device guard to borrow"


assert torch.version.cuda is None or "pytest" in sys.modules, "the dry GPU needs a CPU build of torch"
