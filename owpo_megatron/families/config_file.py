"""A folder's config.json: read, and checked where transformers would take a default, or fail without a reason.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from owpo_megatron.errors import UserError

GGUF = "holds GGUF files, which are quantised for other engines; give the HF folder they were made from"
_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_SIZES = (
    *_NEEDED, "num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings",
    "moe_intermediate_size", "num_experts_per_tok",
)  # fmt: skip
# model_types of folders that hold a vision tower, too -> that of their text model
_TEXT_MODELS = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
_TEXT_PREFIXES = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head": "lm_head",
}
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def read_config_file(path: Path) -> dict[str, Any]:
    """The fields of the config.json in a folder.

    Raises:
        UserError: no such folder or file, or it holds no fields.
    """
    if not path.is_dir():
        raise UserError("model.path", path, "no such folder; give one with config.json and .safetensors files")
    file = path / "config.json"
    if not file.is_file():
        remedy = GGUF if any(path.glob("*.gguf")) else "holds no config.json; give an HF checkpoint folder"
        raise UserError("model.path", path, remedy)
    try:
        raw = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(str(file), f"line {error.lineno}", f"not valid JSON: {error.msg}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise UserError("model.path", file, f"not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError("model.path", file, f"contains a {type(raw).__name__}, not an object with the model's fields")
    return raw


def check_config_file(path: Path, raw: dict[str, Any]) -> None:
    """Check the fields that every family has; a text model inside a multimodal one may leave sizes to its defaults.

    Raises:
        UserError: a size that transformers would take from its own defaults is missing, a size is no positive whole
            number, the dtype is none of weights, or the weights are quantised in a form that is not dequantised.
    """
    where = f"{path / 'config.json'}"
    inner = text_fields(raw)
    raw = inner or raw
    for name in () if inner else _NEEDED:
        if raw.get(name) is None:
            remedy = "add the model's own; transformers would take that of its default model"
            raise UserError(f"{where} {name}", "(missing)", remedy)
    for name in _SIZES:
        value = raw.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"{where} {name}", value, "give a whole number above 0, or leave it out if it is optional")
    for name in ("dtype", "torch_dtype"):
        if raw.get(name) not in (None, *_DTYPES):
            raise UserError(f"{where} {name}", raw[name], f"give one of {', '.join(_DTYPES)}, or leave it out")
    _check_quantization(where, raw)
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(raw.get(name), dict | None):
            remedy = 'give null or an object, e.g. {"rope_type": "linear", "factor": 2.0}'
            raise UserError(f"{where} {name}", raw[name], remedy)


def _check_quantization(where: str, raw: dict[str, Any]) -> None:
    """Weights in FP8 with a scale per block, or in MXFP4, are dequantised when they are read; others are refused."""
    name = next((name for name in ("quantization_config", "compression_config") if raw.get(name)), None)
    if name is None:
        return
    method = raw[name].get("quant_method") if isinstance(raw[name], dict) else raw[name]
    block: Any = raw[name].get("weight_block_size") if method == "fp8" else None
    if method != "mxfp4" and not block:
        remedy = "only mxfp4, and fp8 with weight_block_size, are dequantised; give the unquantised model"
        raise UserError(f"{where} {name}.quant_method", method, remedy)
    is_pair = isinstance(block, list) and len(block) == 2
    if method == "fp8" and not (is_pair and all(type(size) is int and size > 0 for size in block)):
        raise UserError(f"{where} {name}.weight_block_size", block, "give rows and columns of a block, e.g. [128, 128]")


def text_fields(raw: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of the text model alone in a multimodal folder's config.json; None: it is none with a known one."""
    kind, inner = _TEXT_MODELS.get(str(raw.get("model_type"))), raw.get("text_config")
    if kind is None or not isinstance(inner, dict):
        return None
    # the whole model decides whether the head is tied
    shared = {name: raw[name] for name in ("tie_word_embeddings", "quantization_config") if name in raw}
    ends = {name: raw[name] for name in ("bos_token_id", "eos_token_id", "dtype", "torch_dtype") if name in raw}
    return ends | inner | shared | {"model_type": kind}


def refuse_multimodal(folder: Path, field: str) -> None:
    """Refuse a folder that an engine would serve as a multimodal model, under other names than the trainer sends.

    Raises:
        UserError: it holds a text model beside others.
    """
    if text_fields(read_config_file(folder)) is not None:
        remedy = "holds a text model beside others; convert it, which takes the text model out: owpo convert import"
        raise UserError(field, folder, remedy)


def text_name(name: str) -> str | None:
    """The name of a multimodal checkpoint's tensor in a checkpoint of the text model alone; None: it is no part of it.

    Example:
        >>> text_name("model.language_model.layers.0.mlp.up_proj.weight")
        'model.layers.0.mlp.up_proj.weight'
    """
    for prefix, own in _TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return own + name.removeprefix(prefix)
    return name if name == "lm_head.weight" or name.startswith("mtp.") else None
