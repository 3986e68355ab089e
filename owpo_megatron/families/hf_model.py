"""What megatron has to know of an HF model, read from its config.json, and which parallel sizes fit it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from owpo_megatron.config import ParallelConfig
from owpo_megatron.errors import UserError
from owpo_megatron.families.names import FAMILIES, MODEL_TYPES
from owpo_megatron.families.rope import Rope, read_rope
from owpo_megatron.families.rules import Family, Size

_VOCAB_MULTIPLE = 8  # rows of a rank's vocabulary part: GEMM sizes that tensor cores like


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that is every layer's MLP."""

    number: int
    chosen: int  # per token
    ffn_size: int  # of one expert
    normalised: bool  # the chosen experts' probabilities are divided by their sum


@dataclass(frozen=True)
class HFModel:
    """The shape of a model: everything that decides parameters and forward pass, and nothing else.

    Example:
        HFModel(family_name="qwen3", num_layers=36, hidden_size=4096, ffn_size=12288, num_heads=32, num_kv_heads=8,
                head_dim=128, vocab_size=151936, max_positions=32768, window=None, rope=Rope(1e6), norm_eps=1e-6,
                qkv_bias=False, qk_norm=True, tied=False, experts=None)
    """

    family_name: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # true size, without megatron's padding
    max_positions: int
    window: int | None  # tokens that attention sees back, itself included; None: all. See `check_context`
    rope: Rope
    norm_eps: float
    qkv_bias: bool
    qk_norm: bool
    tied: bool  # the output layer is the embedding
    experts: Experts | None = None

    @property
    def family(self) -> Family:
        return FAMILIES[self.family_name]

    @property
    def num_experts(self) -> int:
        """0 for a dense model."""
        return self.experts.number if self.experts else 0

    def size(self, name: Size) -> int:
        """The number behind a size name of the rules."""
        sizes = {
            "hidden": self.hidden_size,
            "ffn": self.ffn_size,
            "vocab": self.vocab_size,
            "head": self.head_dim,
            "q": self.num_heads * self.head_dim,
            "kv": self.num_kv_heads * self.head_dim,
            "experts": self.num_experts,
            "expert_ffn": self.experts.ffn_size if self.experts else 0,
        }
        return sizes[name]


def read_hf_config(path: Path | str) -> HFModel:
    """Read the shape of the model in an HF folder (only config.json is needed).

    Raises:
        UserError: no such folder or config.json, a family without a table, or a feature that megatron's model would
            silently lack (unsupported rope scaling, other biases or activations, layers without experts among others).
    """
    path = Path(path)
    model_type = _model_type(path)
    if model_type not in MODEL_TYPES:
        raise UserError("model.path", path, f"model_type {model_type} has no table; known: {', '.join(MODEL_TYPES)}")
    family = MODEL_TYPES[model_type]
    # transformers knows each type's defaults, and where older and newer files keep the rope settings
    config = AutoConfig.from_pretrained(path)
    _refuse_unsupported(path, config)
    num_heads = config.num_attention_heads
    return HFModel(
        family_name=family.name,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_size=config.intermediate_size,
        num_heads=num_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        vocab_size=config.vocab_size,
        max_positions=config.max_position_embeddings,
        window=_window(config),
        rope=read_rope(path, config),
        norm_eps=config.rms_norm_eps,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        tied=bool(config.tie_word_embeddings),
        experts=_experts(path, config) if family.experts else None,
    )


def check_parallel(model: HFModel, parallel: ParallelConfig) -> None:
    """Refuse parallel sizes that do not divide the model.

    Raises:
        UserError: naming parallel.tp, pp, vpp, ep or sp, with the values that fit.
    """
    ffn_size = model.experts.ffn_size if model.experts else model.ffn_size
    common = math.gcd(model.num_heads, model.num_kv_heads, ffn_size)
    if common % parallel.tp:
        raise UserError(
            "parallel.tp",
            parallel.tp,
            f"must divide the model's {model.num_heads} attention heads, {model.num_kv_heads} key-value heads and "
            f"ffn size {ffn_size}; use one of {_divisors(common)}",
        )
    if model.num_layers % parallel.pp:
        raise UserError(
            "parallel.pp",
            parallel.pp,
            f"must divide the model's {model.num_layers} layers; use one of {_divisors(model.num_layers)}",
        )
    layers_per_rank = model.num_layers // parallel.pp
    if parallel.vpp is not None and layers_per_rank % parallel.vpp:
        raise UserError(
            "parallel.vpp",
            parallel.vpp,
            f"must divide the {layers_per_rank} layers of a pipeline rank; use one of {_divisors(layers_per_rank)}",
        )
    _check_experts(model, parallel)


def check_context(model: HFModel, tokens: int) -> None:
    """Refuse sequences longer than an attention window.

    Up to the window a windowed model is a plain causal one, on the trainer's side and on the engine's; beyond it the
    trainer has no windowed attention.

    Raises:
        UserError: the longest possible sequence (prompt and response) exceeds the model's window.
    """
    if model.window is not None and tokens > model.window:
        raise UserError(
            "data.max_prompt_tokens + rollout.max_response_tokens",
            tokens,
            f"the model attends to {model.window} tokens only (sliding_window); sequences up to that length are "
            "supported: lower one of the two",
        )


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """The vocabulary's size in megatron: the next multiple of 8 tp. Padding rows are zero and never exported.

    A checkpoint keeps only the true rows, so the padding may differ from run to run.

    Example:
        >>> padded_vocab_size(151_665, 4)
        151680
    """
    multiple = _VOCAB_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def _model_type(path: Path) -> str:
    if not path.is_dir():
        raise UserError("model.path", path, "no such folder; give one with config.json and .safetensors files")
    file = path / "config.json"
    if not file.is_file():
        raise UserError("model.path", path, "holds no config.json; give an HF checkpoint folder")
    try:
        raw = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(str(file), f"line {error.lineno}", f"not valid JSON: {error.msg}") from error
    return str(raw.get("model_type"))


def _refuse_unsupported(path: Path, config: Any) -> None:
    unsupported = {
        "hidden_act": (config.hidden_act, config.hidden_act == "silu", "silu"),
        "attention_bias": (
            getattr(config, "attention_bias", False),
            not getattr(config, "attention_bias", False),
            False,
        ),
        "mlp_bias": (getattr(config, "mlp_bias", False), not getattr(config, "mlp_bias", False), False),
    }
    for field, (value, supported, expected) in unsupported.items():
        if not supported:
            raise UserError(f"{path / 'config.json'} {field}", value, f"not supported; only {expected} is")


def _window(config: Any) -> int | None:
    """transformers leaves it None where `use_sliding_window` is false, as in Qwen2.5's configs."""
    window = getattr(config, "sliding_window", None)
    return window if window is not None and window < config.max_position_embeddings else None


def _experts(path: Path, config: Any) -> Experts:
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise UserError(
            f"{path / 'config.json'} mlp_only_layers, decoder_sparse_step",
            (config.mlp_only_layers, config.decoder_sparse_step),
            "not supported; only experts in every layer are ([] and 1)",
        )
    return Experts(config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, config.norm_topk_prob)


def _check_experts(model: HFModel, parallel: ParallelConfig) -> None:
    if model.experts is None:
        if parallel.ep > 1:
            raise UserError("parallel.ep", parallel.ep, f"{model.family_name} has no experts; leave it out")
        return
    if model.num_experts % parallel.ep:
        raise UserError(
            "parallel.ep",
            parallel.ep,
            f"must divide the model's {model.num_experts} experts; use one of {_divisors(model.num_experts)}",
        )
    if parallel.tp > 1 and not parallel.sp:
        raise UserError("parallel.sp", False, "megatron-core trains experts at tp > 1 with sp only; set it true")


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
