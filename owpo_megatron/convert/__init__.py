"""HF checkpoints to megatron-core's parameters and back, one tensor at a time."""

from owpo_megatron.convert.families import FAMILIES, MODEL_TYPES
from owpo_megatron.convert.hf_model import (
    Experts,
    HFModel,
    check_context,
    check_parallel,
    padded_vocab_size,
    read_hf_config,
)
from owpo_megatron.convert.reader import HFReader
from owpo_megatron.convert.rope import Rope, Yarn
from owpo_megatron.convert.rules import Family, Part, Rule
from owpo_megatron.convert.weights import (
    Place,
    check_weights,
    hf_parts,
    hf_shapes,
    megatron_names,
    place_of,
    to_hf,
    to_megatron,
)
from owpo_megatron.convert.writer import HFWriter, carry_files

__all__ = [
    "FAMILIES",
    "MODEL_TYPES",
    "Experts",
    "Family",
    "HFModel",
    "HFReader",
    "HFWriter",
    "Part",
    "Place",
    "Rope",
    "Rule",
    "Yarn",
    "carry_files",
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
