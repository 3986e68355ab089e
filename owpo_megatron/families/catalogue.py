"""The model families that there are, by config.json's model_type. Imports neither torch nor transformers.

A family of another package is found by an entry point of the group `owpo.families` whose name is the model_type and
whose value is the `Family` (docs/families.md).
"""

from __future__ import annotations

import importlib
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from owpo_megatron.errors import UserError

if TYPE_CHECKING:
    from owpo_megatron.families.family import Family

PAGE = "docs/families.md"
GROUP = "owpo.families"

# model_type -> (module in this room, name of the Family in it)
MODEL_TYPES: dict[str, tuple[str, str]] = {
    "llama": ("llama", "LLAMA"),
    "mistral": ("llama", "MISTRAL"),
    "qwen2": ("llama", "QWEN2"),
    "qwen3": ("llama", "QWEN3"),
    "qwen3_moe": ("qwen_moe", "QWEN3_MOE"),
    "qwen2_moe": ("qwen_moe", "QWEN2_MOE"),
    "qwen3_next": ("qwen_next", "QWEN3_NEXT"),
    "qwen3_5_text": ("qwen_next", "QWEN3_5"),
    "qwen3_5_moe_text": ("qwen_next", "QWEN3_5_MOE"),
    "mixtral": ("mixtral", "MIXTRAL"),
    "glm4": ("glm", "GLM4"),
    "glm4_moe": ("glm", "GLM4_MOE"),
    "deepseek_v2": ("deepseek", "DEEPSEEK_V2"),
    "deepseek_v3": ("deepseek", "DEEPSEEK_V3"),
    "kimi_k2": ("deepseek", "DEEPSEEK_V3"),
    "gpt_oss": ("gpt_oss", "GPT_OSS"),
    "phi3": ("phi3", "PHI3"),
    "olmo2": ("olmo2", "OLMO2"),
    "olmo3": ("olmo2", "OLMO3"),
    "granite": ("granite", "GRANITE"),
    "gemma3_text": ("gemma3", "GEMMA3"),
}


def known_types() -> list[str]:
    """Every model_type that can be read, those of other packages included."""
    return [*MODEL_TYPES, *sorted(_from_outside().keys() - MODEL_TYPES.keys())]


def family_of(model_type: str, path: Path | str) -> Family:
    """The family of a model_type; `path` is the model's folder, for the error.

    Raises:
        UserError: there is none, or the package that has it cannot be imported.
    """
    if model_type in MODEL_TYPES:
        module, name = MODEL_TYPES[model_type]
        family: Family = getattr(importlib.import_module(f"owpo_megatron.families.{module}"), name)
        return family
    outside = _from_outside().get(model_type)
    if outside is None:
        remedy = f"model_type {model_type:.60} is not supported; supported: {', '.join(known_types())} ({PAGE})"
        raise UserError("model.path", path, remedy)
    try:
        family = outside.load()
    except (ImportError, AttributeError) as error:
        package = outside.dist.name if outside.dist else outside.value
        remedy = f"the family of model_type {model_type} comes from {package}, which fails: {error}"
        raise UserError("model.path", path, remedy) from error
    return family


def family_named(name: str) -> Family:
    """The family that a model description names (`HFModel.family_name`)."""
    for model_type in known_types():
        if model_type == name:
            return family_of(model_type, name)
    for model_type in known_types():
        if (family := family_of(model_type, name)).name == name:
            return family
    raise KeyError(name)


def _from_outside() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
