"""Model families: what a Hugging Face config means, and how its weights map to megatron-core's parameters."""

from owpo_megatron.families.hf_model import (
    Experts,
    HFModel,
    check_context,
    check_parallel,
    padded_vocab_size,
    read_hf_config,
)
from owpo_megatron.families.names import FAMILIES, MODEL_TYPES
from owpo_megatron.families.reader import HFReader
from owpo_megatron.families.rope import Rope, Yarn
from owpo_megatron.families.rules import Family, Part, Rule
from owpo_megatron.families.weights import (
    Place,
    check_weights,
    hf_parts,
    hf_shapes,
    megatron_names,
    place_of,
    to_hf,
    to_megatron,
)

__all__ = [
    "FAMILIES",
    "MODEL_TYPES",
    "Experts",
    "Family",
    "HFModel",
    "HFReader",
    "Part",
    "Place",
    "Rope",
    "Rule",
    "Yarn",
    "check_context",
    "check_parallel",
    "check_weights",
    "hf_parts",
    "hf_shapes",
    "megatron_names",
    "padded_vocab_size",
    "place_of",
    "read_hf_config",
    "to_hf",
    "to_megatron",
]
