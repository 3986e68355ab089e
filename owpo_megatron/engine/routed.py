"""Experts in an engine's answer: for every token that it read, those that its routers chose in each layer.

SGLang sends int32 in base64, [tokens, layers, chosen], with zeros in layers without experts.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from owpo_megatron.types import ExpertShape, RoutedExperts


def read_experts(told: Any, tokens: int, shape: ExpertShape) -> RoutedExperts:
    """Return the experts of `meta_info.routed_experts`.

    Args:
        tokens: that the engine read: prompt and response without its last token.

    Raises:
        ValueError: the answer has something else, with the reason.
    """
    import numpy

    if not isinstance(told, str):
        raise ValueError("no routed_experts")
    try:
        content = base64.b64decode(told, validate=True)
    except binascii.Error as error:
        raise ValueError(f"routed_experts in no base64 ({error})") from error
    if len(content) != 4 * tokens * shape.num_layers * shape.chosen:
        wanted = f"{tokens} tokens, {shape.num_layers} layers and {shape.chosen} experts"
        raise ValueError(f"{len(content) // 4} numbers in routed_experts for {wanted}")
    told_TLK = numpy.frombuffer(content, "<i4").reshape(tokens, shape.num_layers, shape.chosen)
    expert_TLK = told_TLK[:, list(shape.layers)]
    if tokens and not 0 <= int(expert_TLK.min()) <= int(expert_TLK.max()) < shape.number:
        raise ValueError(f"routed_experts beyond the {shape.number} of a layer")
    ordered_TLK = numpy.sort(expert_TLK.astype(numpy.int16), axis=-1)
    if (ordered_TLK[..., 1:] == ordered_TLK[..., :-1]).any():
        raise ValueError("routed_experts with an expert twice for a token")
    return RoutedExperts.of(expert_TLK, shape.number)
