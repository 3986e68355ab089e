"""Tiny models and samples that the tests of several rooms share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from owpo_megatron.config import Config, hf_folder
from owpo_megatron.types import Sample

# families whose norms have weights around zero, but for those inside a delta net
AROUND_ZERO = ("gemma3_text", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")


def make_hf_model(
    out: Path, family: str = "qwen3", tied: bool = False, vocab_size: int = 96, seed: int = 0, **fields: Any
) -> Path:
    """A random fp32 model of ~60 k parameters as an HF folder (no tokenizer); every weight random, norms included."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )
    if family == "qwen3_moe":
        shape |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    if family in ("qwen3", "qwen3_moe", "llama", "mistral"):
        shape["head_dim"] = 16  # not hidden_size / heads
    config = AutoConfig.for_model(family, **(shape | {"pad_token_id": None, "eos_token_id": None} | fields))
    model = AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        constants = [(name, value) for name, value in model.named_buffers() if name.endswith("correction_bias")]
        for name, param in [*model.named_parameters(), *constants]:
            around_zero = family in AROUND_ZERO and "linear_attn" not in name
            centre = 1.0 if "norm" in name and not around_zero else 0.0
            param.copy_(centre + 0.15 * torch.randn(param.shape, generator=generator))
    model.save_pretrained(out)
    return out


def make_config(model: Path, /, **sections: Any) -> Config:
    """A small run's config; keyword sections are merged over these."""
    raw: dict[str, Any] = dict(
        model={"path": str(model)},
        data={"source": "task:cipher"},
        rollout={"prompts_per_step": 4, "group_size": 4, "max_response_tokens": 8},
        optimizer=dict(steps=6, updates_per_step=2, lr=1e-3, warmup_steps=2, eps=1e-5, tokens_per_microbatch=24),
        reference={"every": 2},
    )
    for name, value in sections.items():
        raw[name] = raw.get(name, {}) | value if isinstance(value, dict) else value
    return Config.build(raw)


def random_samples(seed: int, count: int = 8, vocab_size: int = 96, logps: bool = True) -> list[Sample]:
    """Samples of unequal lengths with non-uniform advantages, some inactive, one masked, old and reference given."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    samples = []
    for index in range(count):
        length = integer(2, 9)
        old = -4.5 + 0.3 * torch.randn(length, generator=generator)
        ref = old + 0.2 * torch.randn(length, generator=generator)
        samples.append(
            Sample(
                prompt_ids=tuple(integer(0, vocab_size) for _ in range(integer(1, 7))),
                response_ids=tuple(integer(0, vocab_size) for _ in range(length)),
                advantage=float(torch.randn(1, generator=generator)),
                active=index % 3 != 2,
                behaviour_logp=tuple(old.tolist()),
                old_logp=old if logps else None,
                ref_logp=ref if logps else None,
                masked=index == 5,
            )
        )
    return samples


_newest: list[Any] = []  # a layout and its topology


def _shared_topology(config: Config) -> Any:
    from megatron.core import parallel_state

    from owpo_megatron.mcore.topology import init_topology

    if _newest and _newest[0] == config.parallel and parallel_state.model_parallel_is_initialized():
        if parallel_state.get_tensor_model_parallel_group() is _newest[1].tp_group:
            return _newest[1]
    _newest[:] = [config.parallel, init_topology(config.parallel, config.seed)]
    return _newest[1]


def build_policy(config: Config, topology: Any = None) -> Any:
    """The policy of a config in this process, which is one rank of `config.parallel` (a world of one under pytest).

    Policies of one layout share the newest topology: every gloo group brings threads of its own, which wake a hundred
    times a second.
    """
    from owpo_megatron.families import read_hf_config
    from owpo_megatron.policy import MegatronPolicy

    topology = topology or _shared_topology(config)
    hf = read_hf_config(hf_folder(config.model.path))
    temperature, raw = config.rollout.temperature, config.megatron
    return MegatronPolicy(
        config.model, config.parallel, config.optimizer, config.reference, hf, topology, temperature, raw
    )
