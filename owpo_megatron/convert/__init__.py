"""HF checkpoints to megatron-core's parameters and back, one tensor at a time."""

from owpo_megatron.convert.families import FAMILIES, MODEL_TYPES
from owpo_megatron.convert.hf_model import HFModel, check_parallel, padded_vocab_size, read_hf_config
from owpo_megatron.convert.reader import HFReader
from owpo_megatron.convert.rules import Family, Part, Rule
from owpo_megatron.convert.weights import check_weights, hf_shapes, to_hf, to_megatron
from owpo_megatron.convert.writer import HFWriter, carry_files

__all__ = [
    "FAMILIES",
    "MODEL_TYPES",
    "Family",
    "HFModel",
    "HFReader",
    "HFWriter",
    "Part",
    "Rule",
    "carry_files",
    "check_parallel",
    "check_weights",
    "hf_shapes",
    "padded_vocab_size",
    "read_hf_config",
    "to_hf",
    "to_megatron",
]
