"""transformers' own forward pass with one layer of the model in memory at a time, in float32 on the host."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from owpo_megatron.families import HFModel, stacked, transformers_config

_FEW_TOKENS = 8  # the embedding of the one-layer models, which nothing uses
# Fields that decide something for one layer, or outside the layers -> their value for the model of that layer alone.
_ONE_LAYER: dict[str, Callable[[Any, int], Any]] = {
    "first_k_dense_replace": lambda value, layer: int(layer < value),
    "mlp_only_layers": lambda value, layer: [0] if layer in value else [],
    "decoder_sparse_step": lambda value, layer: 1 if (layer + 1) % value == 0 else 2,
    "embedding_multiplier": lambda value, layer: 1.0,
}
_LAYER = re.compile(r"(?<=^model\.layers\.)\d+(?=\.)")


class HFLayers:
    """The layers of an HF model, each made by transformers from the checkpoint's tensors when it is its turn.

    Args:
        folder: has the config.json.
    """

    def __init__(self, folder: Path, model: HFModel):
        self._model = model
        self._config = transformers_config(folder)
        if hasattr(self._config, "quantization_config"):  # the tensors come dequantised
            del self._config.quantization_config

    @torch.no_grad()
    def layer(self, tensors: dict[str, torch.Tensor], norm: torch.Tensor | None, hidden_TH: torch.Tensor) -> Any:
        """[T, H] -> [T, H] through one layer.

        Args:
            tensors: the layer's, experts one by one.
            norm: the final norm's weight, applied behind the layer; None: it is not the last one.
        """
        in_checkpoint = stacked(self._model.num_experts, tensors.items())
        whole = {_LAYER.sub("0", name): tensor for name, tensor in in_checkpoint}
        size = (_FEW_TOKENS, self._model.hidden_size)
        whole |= {"model.embed_tokens.weight": torch.zeros(size), "lm_head.weight": torch.zeros(size)}
        whole["model.norm.weight"] = torch.ones(self._model.hidden_size) if norm is None else norm
        (number,) = {int(match[0]) for name in tensors if (match := _LAYER.search(name))}
        with _quiet():
            causal_lm = MODEL_FOR_CAUSAL_LM_MAPPING[type(self._config)].from_pretrained(
                None, config=self._config_of(number), state_dict=whole, dtype=torch.float32
            )
        decoder = causal_lm.model.eval()
        if self._config.model_type == "deepseek_v2":
            _complete_deepseek_v2(decoder.layers[0], self._config)
        if norm is None:
            decoder.norm = torch.nn.Identity()
        return decoder(inputs_embeds=hidden_TH[None], use_cache=False).last_hidden_state[0]

    def _config_of(self, layer: int) -> Any:
        config = copy.deepcopy(self._config)
        config.num_hidden_layers = 1
        config.vocab_size = _FEW_TOKENS
        config.pad_token_id = None
        config.tie_word_embeddings = False
        if getattr(config, "layer_types", None):
            config.layer_types = [self._config.layer_types[layer]]
            if config.model_type == "olmo3" and config.layer_types == ["sliding_attention"]:
                # as the authors and SGLang do; transformers 5.12.1 scales the frequencies of these layers, too
                config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
        for field, value in _ONE_LAYER.items():
            if hasattr(config, field):
                setattr(config, field, value(getattr(config, field), layer))
        return config


def _complete_deepseek_v2(layer: Any, config: Any) -> None:
    """Add what transformers 5.12.1 leaves out of DeepSeek-V2: YaRN's factor in the scores, and a router's attribute.

    The authors' own code scales the scores by the factor, as transformers does in DeepSeek-V3
    (modeling_deepseek_v3.py: `self.scaling * mscale * mscale`).
    """
    rope = config.rope_parameters
    if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim"):
        factor = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1
        layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5 * factor**2
    layer.mlp.num_experts = config.n_routed_experts  # route_tokens_to_experts reads it, __init__ does not set it


class _quiet:
    """No bar and no warnings for each one-layer model."""

    def __enter__(self) -> None:
        self._verbosity = transformers_logging.get_verbosity()
        self._bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self._verbosity)
        if self._bars:
            transformers_logging.enable_progress_bar()
