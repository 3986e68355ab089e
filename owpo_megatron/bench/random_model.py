"""Random models for the benchmarks: a config.json of about the wanted size, and weights for it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel, hf_shapes, read_hf_config, stacked_shapes

HEAD_DIM, SMALLEST, STEP = 64, 64, 8  # of the width
LAYERS, LAYERS_OF_WIDE = 12, 36
WIDE = 1024
SCALE = 0.02


def random_model(params: int, folder: Path, option: str = "params") -> HFModel:
    """Write the config.json of a Qwen3-like model with about `params` parameters into `folder`; return the model.

    Args:
        params: number of parameters; the model's differs by at most a few percent, by more for very small ones.
        option: name for errors.

    Raises:
        UserError: `params` is too small for any model of this shape.
    """

    def of_width(width: int) -> HFModel:
        return write_config(folder, _qwen3(width))

    width = SMALLEST
    while num_parameters(of_width(width + STEP)) <= params:
        width += STEP
    sizes = {candidate: num_parameters(of_width(candidate)) for candidate in (width, width + STEP)}
    if sizes[width] > 1.5 * params:
        raise UserError(option, params, f"use at least {sizes[width]}")
    return of_width(min(sizes, key=lambda candidate: abs(sizes[candidate] - params)))


def write_config(folder: Path, fields: Mapping[str, Any]) -> HFModel:
    """Write a config.json with these fields and read it back."""
    (folder / "config.json").write_text(json.dumps(fields))
    return read_hf_config(folder)


def random_weights(
    model: HFModel, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (HF name, tensor) of every weight, one tensor in memory at a time; norms are near 1, the rest near 0."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in stacked_shapes(hf_shapes(model)).items():
        tensor = torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(SCALE)
        yield name, tensor + 1 if "norm" in name else tensor


def num_parameters(model: HFModel) -> int:
    """Return the number of parameters; tied weights count once."""
    return sum(torch.Size(shape).numel() for shape in hf_shapes(model).values())


def _qwen3(width: int) -> dict[str, Any]:
    heads = max(1, width // HEAD_DIM)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": LAYERS if width <= WIDE else LAYERS_OF_WIDE,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": HEAD_DIM,
        "vocab_size": 8192,
        "max_position_embeddings": 1024,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
