"""The model families that convert. A new one is a table file and a line here."""

from __future__ import annotations

from owpo_megatron.families.llama import LLAMA
from owpo_megatron.families.mistral import MISTRAL
from owpo_megatron.families.qwen2 import QWEN2
from owpo_megatron.families.qwen3 import QWEN3
from owpo_megatron.families.qwen3_moe import QWEN3_MOE
from owpo_megatron.families.rules import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (QWEN2, QWEN3, QWEN3_MOE, LLAMA, MISTRAL)}

MODEL_TYPES: dict[str, Family] = {kind: family for family in FAMILIES.values() for kind in family.model_types}
