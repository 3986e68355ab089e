"""Names of a rank's parameters in the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

ROUTER_BIAS = "expert_bias"  # a constant of the router: a buffer, not a parameter


def named_shards(chunks: Sequence[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name with global indices of layer and expert, this rank's tensor) of every chunk, in module order.

    Parameters come first, then the constants of the routers.
    """
    for chunk in chunks:
        model = chunk
        while hasattr(model, "module"):
            model = model.module
        constants = [(name, value) for name, value in model.named_buffers() if name.endswith(ROUTER_BIAS)]
        for name, param in [*model.named_parameters(), *constants]:
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                layer = model.decoder.layers[int(parts[2])]
                parts[2] = str(layer.layer_number - 1)
                if parts[3:5] == ["mlp", "experts"]:
                    _name_globally(parts, layer.mlp.local_expert_indices[0])
            yield ".".join(parts), param


def is_expert(name: str) -> bool:
    """Whether only the ranks of one expert-parallel index hold this parameter."""
    return ".mlp.experts." in name


def _name_globally(parts: list[str], first_expert: int) -> None:
    """Replace this rank's expert index by the layer's, in local_experts.0... or linear_fc1.weight0."""
    if parts[5] == "local_experts":
        parts[6] = str(int(parts[6]) + first_expert)
    else:
        stem = parts[6].rstrip("0123456789")
        parts[6] = f"{stem}{int(parts[6].removeprefix(stem)) + first_expert}"
