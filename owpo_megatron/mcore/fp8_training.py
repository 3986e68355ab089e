"""Training in FP8 through Transformer Engine (`megatron: {fp8: hybrid}`): recipes that work, and the packs they need.

Never run: no GPU was at hand. Written against megatron-core 0.16.1 and Transformer Engine 2.11.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.core.transformer import TransformerConfig

from owpo_megatron.errors import UserError

# Tokens of a rank's part of the sequence must be a multiple of this. FP8 GEMMs want 8 rows of activations, and 16 where
# the gradient of the weight sums over them; blocks of scales are 128 (32 in mxfp8) along that sum.
_TOKENS = {"tensorwise": 16, "blockwise": 128, "mxfp8": 32}
_DEFAULT = "tensorwise"


def fp8_fields(raw: Mapping[str, Any], has_experts: bool) -> dict[str, Any]:
    """Fields of TransformerConfig that a configuration with `megatron.fp8` needs beside its own; none without it.

    The recipe is current scaling per tensor where none is named: megatron-core's default, delayed scaling, passes an
    argument that Transformer Engine's class does not take (tests/project/test_signatures.py).

    Raises:
        UserError: a recipe that cannot work, or parameters in FP8, which the reference's slots do not cover.
    """
    if not raw.get("fp8"):
        return {}
    recipe = raw.get("fp8_recipe", _DEFAULT)
    if recipe not in _TOKENS:
        why = "megatron-core 0.16.1 and Transformer Engine 2.11 disagree about its arguments; " * (recipe == "delayed")
        raise UserError("megatron.fp8_recipe", recipe, f"{why}use {', '.join(_TOKENS)}")
    if raw.get("fp8_param"):
        remedy = "parameters stay in bfloat16, which the reference's slots and the weight sync need; remove it"
        raise UserError("megatron.fp8_param", True, remedy)
    return {"fp8_recipe": recipe} | ({"moe_router_padding_for_quantization": True} if has_experts else {})


def pack_multiple(config: TransformerConfig, tp: int) -> int:
    """Tokens that the length of a pack must be a multiple of: each tensor-parallel rank may get its part of them.

    Example:
        >>> from types import SimpleNamespace
        >>> pack_multiple(SimpleNamespace(fp8=None), tp=4)
        4
        >>> pack_multiple(SimpleNamespace(fp8="hybrid", fp8_recipe="blockwise"), tp=4)
        512
    """
    return tp * (_TOKENS[config.fp8_recipe] if config.fp8 else 1)
