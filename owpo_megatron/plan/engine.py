"""Memory left for an SGLang engine's key-value cache, and how many responses that is."""

from __future__ import annotations

from dataclasses import dataclass

from owpo_megatron.config import Config
from owpo_megatron.families import HFModel
from owpo_megatron.plan.parameters import whole_model

ALONE = 0.88  # SGLang's own mem_fraction_static is about this where nothing else is on the GPU
CACHE = 2  # bytes of an element: the cache is in the model's type, bfloat16 on GPUs


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on each GPU of one engine."""

    static: int  # weights and cache together: mem_fraction_static of the GPU, or less by max_total_tokens
    weights: int
    cache: int  # what is left of it; negative: not even the weights fit
    token: int  # bytes of one token in the cache

    @property
    def tokens(self) -> int:
        """Number of tokens that the cache holds."""
        return max(self.cache, 0) // self.token


def engine_memory(config: Config, model: HFModel, gpu_bytes: int) -> EngineMemory:
    """Memory of an engine of `engine.tp` GPUs with this much memory each."""
    tp = config.engine.tp
    element = 4 if config.model.dtype == "float32" else CACHE
    static = int(float(config.sglang.get("mem_fraction_static", ALONE)) * gpu_bytes)
    weights = whole_model(model) * element // tp
    token = model.num_layers * model.attention.cache_elements(tp) * element
    if (limit := config.sglang.get("max_total_tokens")) is not None:
        static = min(static, weights + int(limit) * token)
    return EngineMemory(static, weights, static - weights, token)
