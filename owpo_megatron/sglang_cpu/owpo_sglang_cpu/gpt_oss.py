"""gpt-oss on a CPU: sinks in the model's dtype, and a place among the models that plain PyTorch attention serves."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def with_exact_sinks(construct: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """SGLang's `_initialize_model`, with sinks of the model's dtype: it has bfloat16 for its own kernels' sake."""

    @functools.wraps(construct)
    def initialize_model(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model = construct(*args, **kwargs)
        for module in model.modules():
            if isinstance(getattr(module, "sinks", None), torch.nn.Parameter):
                sinks = module.sinks.data.to(module.o_proj.weight.dtype)
                module.sinks = torch.nn.Parameter(sinks, requires_grad=False)
        return model

    return initialize_model


def accept_torch_native(hooks: Any) -> None:
    """Let SGLang's check of a model's attention backend pass for torch_native, where it names intel_amx.

    The stock torch_native has neither windows nor sinks; ours (attention.py) has both, as intel_amx does.
    """
    backends_of: Callable[[Any], tuple[str, ...]] = hooks.attention_backends_of

    def capable(settings: Any) -> tuple[str, ...]:
        return tuple("intel_amx" if name == "torch_native" else name for name in backends_of(settings))

    hooks.attention_backends_of = capable
