"""Import hooks that let SGLang's CUDA-specific imports succeed with a CPU build of torch.

Loaded by a .pth in every interpreter of the environment, so it must be cheap: it only installs the finders.

triton: SGLang imports it at module level to define kernels. The wheel (1 GB installed) is useless on a CPU; a stub
    replaces it when it is absent. Kernels then stay plain functions and launching one (`kernel[grid](...)`) raises
    TypeError, so nothing computes a wrong result silently.
IPython: imported for two names that display results in a notebook.
torchvision: the wheel's C extension links libtorch_cuda and cannot load with a CPU torch; its Python half registers
    fake kernels for two operators of that extension at import, so these are declared first.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any

ModuleSpec = importlib.machinery.ModuleSpec


class StubClass:
    """Base of every class of the stub: may be subclassed and instantiated, does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass


class StubModule(types.ModuleType):
    """A module whose attributes are stub classes (Capitalised) or further stub modules; also usable as a decorator."""

    __version__ = "0.0.0+stub"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any
        if name[0].isupper():
            base: type = Exception if name.endswith(("Error", "Resources")) else StubClass
            value = type(name, (base,), {"__module__": self.__name__})
        elif name == "cdiv":
            value = _cdiv
        elif name == "next_power_of_2":
            value = _next_power_of_2
        else:
            value = importlib.import_module(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the function for `@triton.jit`, and such a decorator for `@triton.autotune(...)`."""
        if len(args) == 1 and not kwargs and isinstance(args[0], (types.FunctionType, type)):
            return args[0]
        return lambda function: function

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __contains__(self, item: object) -> bool:
        return False


def _cdiv(a: int, b: int) -> int:
    return -(a // -b)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 1


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `root` and everything below it as stubs. Last in sys.meta_path, so that a real package takes precedence."""

    def __init__(self, root: str):
        self.root = root

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name == self.root or name.startswith(self.root + "."):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> StubModule:
        return StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Declares torchvision's two operators when torchvision is first imported, then removes itself."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if not torch.cuda.is_available():
                library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                # the declaration lives as long as the Library object
                self.library = library
                _kept.append(self)
        return None


_kept: list[TorchvisionFinder] = []

# Where triton is the stub, torch.compile cannot generate code: what SGLang decorates with it runs as it is written.
if importlib.machinery.PathFinder.find_spec("triton") is None:
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
sys.meta_path.insert(0, TorchvisionFinder())
sys.meta_path += [StubFinder("triton"), StubFinder("IPython")]
