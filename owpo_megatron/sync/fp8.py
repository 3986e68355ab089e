"""Weights quantised on the way to engines that run in block FP8: e4m3 values, one scale for every 128 x 128 block.

What SGLang 0.5.21 expects of such an engine (layers/quantization/fp8.py): for every linear layer `X.weight` in
float8_e4m3fn and `X.weight_scale_inv` [ceil(N/128), ceil(K/128)] in float32, with weight = value * scale; embeddings,
norms, the head and MoE routers as they are. It copies whatever it is sent into these parameters: a bfloat16 weight
would be rounded without a scale, silently. So an engine's precision and `sync.fp8` are compared before the first push.

`--quantization fp8` (SGLang quantises a bfloat16 checkpoint at its start) is another thing: it transposes its weights,
cannot load new ones into them, and is refused.
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
_LINEAR = re.compile(r"\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)\.weight$")
_LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
_SMALLEST_PEAK = 1e-12  # a block of zeros gets a scale that is no zero


def engine_arguments(raw: Mapping[str, Any]) -> dict[str, Any]:
    """SGLang's arguments for an engine that starts in block FP8 from the configuration of a bfloat16 model."""
    override = json.loads(raw.get("json_model_override_args") or "{}")
    return {"json_model_override_args": json.dumps(override | {"quantization_config": QUANTIZATION_CONFIG})}


def quantized(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """(HF name, tensor) pairs with every linear layer's weight replaced by its values and its scales."""
    for name, tensor in weights:
        if _LINEAR.search(name):
            values, scales = quantize_blocks(tensor)
            yield name, values
            yield f"{name}_scale_inv", scales
        else:
            yield name, tensor


def quantize_blocks(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [N, K] in float8_e4m3fn and scales [ceil(N/128), ceil(K/128)] in float32; weight is about value * scale.

    The scale of a block makes its largest magnitude 448, e4m3's largest. The error of a weight is at most 1/16 of it
    (half a step of a 3-bit mantissa) or, for tiny ones, half of e4m3's smallest step (2**-10) times the scale.
    """
    N, K = weight_NK.shape
    rows, columns = -(-N // BLOCK), -(-K // BLOCK)
    padded = torch.nn.functional.pad(weight_NK.float(), (0, columns * BLOCK - K, 0, rows * BLOCK - N))
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)).clamp_(min=_SMALLEST_PEAK) / _LARGEST
    values = (blocks / scales[:, None, :, None]).clamp_(-_LARGEST, _LARGEST)
    return values.view_as(padded)[:N, :K].to(torch.float8_e4m3fn).contiguous(), scales
