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
    """Check the fields that every family has.

    Raises:
        UserError: a size that transformers would take from its own defaults is missing, a size is no positive whole
            number, the dtype is none of weights, or the weights are quantised in a form that is not dequantised.
    """
    where = f"{path / 'config.json'}"
    for name in _NEEDED:
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
    block = raw[name].get("weight_block_size") if method == "fp8" else None
    if method != "mxfp4" and not block:
        remedy = "only mxfp4, and fp8 with weight_block_size, are dequantised; give the unquantised model"
        raise UserError(f"{where} {name}.quant_method", method, remedy)
    is_pair = isinstance(block, list) and len(block) == 2
    if method == "fp8" and not (is_pair and all(type(size) is int and size > 0 for size in block)):
        raise UserError(f"{where} {name}.weight_block_size", block, "give rows and columns of a block, e.g. [128, 128]")


def inner_type(raw: dict[str, Any]) -> str | None:
    """The model_type of the text model in a multimodal folder."""
    inner = raw.get("text_config")
    return str(inner.get("model_type")) if isinstance(inner, dict) else None
