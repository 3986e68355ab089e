"""Quantise weights for engines that run in block FP8: e4m3 values, one scale per 128 x 128 block.

SGLang 0.5.21 (layers/quantization/fp8.py) expects for every linear layer `X.weight` in float8_e4m3fn and
`X.weight_scale_inv` [ceil(N/128), ceil(K/128)] in float32, with weight = value * scale; embeddings, norms, the head
and MoE routers stay unquantised. It copies whatever it receives into these parameters: a bfloat16 weight would be
rounded without a scale, silently. So an engine's precision is compared with `sync.fp8` before the first push.

`--quantization fp8`, with which SGLang quantises a bfloat16 checkpoint when it starts, is refused: it transposes the
weights and cannot load new ones into them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

BLOCK = 128
QUANTIZATION_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
_LINEAR = re.compile(
    r"\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|w[123]|(q|kv)_(a|b)_proj(_with_mqa)?)\.weight$"
)
_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
_SMALLEST_PEAK = 1e-12  # keeps the scale of an all-zero block above zero


def engine_arguments(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the SGLang arguments that start an engine in block FP8 from the config.json of a bfloat16 model."""
    override = json.loads(raw.get("json_model_override_args") or "{}")
    return {"json_model_override_args": json.dumps(override | {"quantization_config": QUANTIZATION_CONFIG})}


def quantized(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the (HF name, tensor) pairs with every linear layer's weight replaced by its values and its scales."""
    for name, tensor in weights:
        if _LINEAR.search(name):
            values, scales = quantize_blocks(tensor)
            yield name, values
            yield f"{name}_scale_inv", scales
        else:
            yield name, tensor


def quantize_blocks(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values [N, K] in float8_e4m3fn and scales [ceil(N/128), ceil(K/128)] in float32.

    weight is approximately value * scale. The scale maps a block's largest magnitude to 448, the largest of e4m3. A
    weight's error is at most 1/16 of it (half a unit of a 3-bit mantissa) or, near zero, half of e4m3's smallest
    subnormal (2**-10) times the scale.
    """
    N, K = weight_NK.shape
    rows, columns = -(-N // BLOCK), -(-K // BLOCK)
    padded = torch.nn.functional.pad(weight_NK.float(), (0, columns * BLOCK - K, 0, rows * BLOCK - N))
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)).clamp_(min=_SMALLEST_PEAK) / _LARGEST
    values = (blocks / scales[:, None, :, None]).clamp_(-_LARGEST, _LARGEST)
    return values.view_as(padded)[:N, :K].to(torch.float8_e4m3fn).contiguous(), scales
