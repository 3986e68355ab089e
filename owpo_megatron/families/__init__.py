"""Model families: what a Hugging Face config means, and how its weights map to megatron-core's parameters.

Light to import: torch comes with the first use of a reader or of weights (`HFReader`, `to_hf` and so on).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from owpo_megatron.families.attention import Attention, DeltaNet, LatentAttention
from owpo_megatron.families.catalogue import MODEL_TYPES, known_types
from owpo_megatron.families.family import EngineNames, Family
from owpo_megatron.families.fits import check_context, check_parallel, layers_of_stages, padded_vocab_size
from owpo_megatron.families.mlp import MLP, Activation, Experts, Router, SharedExpert
from owpo_megatron.families.model import HFModel, Norms
from owpo_megatron.families.reading import HFConfig, read_hf_config, supported_family, transformers_config
from owpo_megatron.families.rope import Rope, Yarn
from owpo_megatron.families.routing import expert_shape
from owpo_megatron.families.rules import Part, Rule

if TYPE_CHECKING:
    from owpo_megatron.families.engine import EngineLayout
    from owpo_megatron.families.reader import HFReader
    from owpo_megatron.families.stacks import stack_of, stacked, stacked_shapes
    from owpo_megatron.families.weights import (
        Place,
        check_weights,
        float32_tensors,
        forward_flops,
        hf_parts,
        hf_shapes,
        is_float32,
        megatron_names,
        megatron_shape,
        place_of,
        to_hf,
        to_megatron,
    )

_WITH_TORCH = {
    "EngineLayout": "engine",
    "HFReader": "reader",
    "Place": "weights",
    "check_weights": "weights",
    "float32_tensors": "weights",
    "forward_flops": "weights",
    "hf_parts": "weights",
    "hf_shapes": "weights",
    "is_float32": "weights",
    "megatron_names": "weights",
    "megatron_shape": "weights",
    "place_of": "weights",
    "stack_of": "stacks",
    "stacked": "stacks",
    "stacked_shapes": "stacks",
    "to_hf": "weights",
    "to_megatron": "weights",
}


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        return getattr(importlib.import_module(f"owpo_megatron.families.{_WITH_TORCH[name]}"), name)
    raise AttributeError(name)


__all__ = [
    "MLP",
    "MODEL_TYPES",
    "Activation",
    "Attention",
    "DeltaNet",
    "EngineLayout",
    "EngineNames",
    "Experts",
    "Family",
    "HFConfig",
    "HFModel",
    "HFReader",
    "LatentAttention",
    "Norms",
    "Part",
    "Place",
    "Rope",
    "Router",
    "Rule",
    "SharedExpert",
    "Yarn",
    "check_context",
    "check_parallel",
    "check_weights",
    "expert_shape",
    "float32_tensors",
    "forward_flops",
    "hf_parts",
    "hf_shapes",
    "is_float32",
    "known_types",
    "layers_of_stages",
    "megatron_names",
    "megatron_shape",
    "padded_vocab_size",
    "place_of",
    "read_hf_config",
    "supported_family",
    "stack_of",
    "stacked",
    "stacked_shapes",
    "to_hf",
    "to_megatron",
    "transformers_config",
]
