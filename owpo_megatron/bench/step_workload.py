"""The workloads of `owpo bench step`: a random Qwen3 with a tokenizer, its reference, and prompts, as files for both.

Lengths are fixed: every prompt has `prompt` tokens, and no response ends before `response` tokens, since the model's
weights make the end token impossible. Rewards are a function of the response's text, so that both sides compute them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from owpo_megatron.bench.random_model import random_weights, write_config

BETA, CLIP, LEARNING_RATE, CLIP_GRAD = 0.04, 0.2, 1e-4, 1.0
PROMPTS = 256  # in the file
CONSTANT = 4.0  # the residual stream's first element
SHARPER = 4.0  # times random_model's weights: policy and reference then differ enough for a loss that is not 0


@dataclass(frozen=True)
class Workload:
    """A model's shape and a step's size; GRPO with a reference, one update per step, float32."""

    layers: int
    hidden: int
    vocab: int
    prompts: int  # P
    group: int  # G
    prompt: int  # tokens
    response: int  # tokens

    @property
    def tokens(self) -> int:
        """Tokens generated per step."""
        return self.prompts * self.group * self.response

    @property
    def end(self) -> int:
        """Id of the end token, the last one."""
        return self.vocab - 1


WORKLOADS = {
    "small": Workload(2, 64, 512, 8, 8, 16, 32),
    "medium": Workload(4, 256, 8192, 8, 8, 32, 64),
    "long": Workload(4, 256, 8192, 4, 8, 64, 256),
}


def write_workload(folder: Path, workload: Workload) -> None:
    """Write policy/, reference/ (HF folders with a tokenizer) and prompts.jsonl into `folder`."""
    for seed, name in enumerate(("policy", "reference")):
        _write_model(folder / name, workload, seed)
    draw = random.Random(0)
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(PROMPTS):
            words = " ".join(f"t{draw.randrange(workload.end)}" for _ in range(workload.prompt))
            file.write(json.dumps({"problem": words, "answer": "1", "prompt": words}) + "\n")


def run_config(
    folder: Path, workload: Workload, steps: int, ranks: int, engines: int = 1, deterministic: bool = True
) -> dict[str, Any]:
    """The configuration of our side; what a step of the other side has no counterpart to is off."""
    return {
        "name": "step",
        "model": {"path": str(folder / "policy")},
        "data": {"source": str(folder / "prompts.jsonl"), "max_prompt_tokens": workload.prompt},
        "algorithm": {
            "name": "grpo", "beta": BETA, "clip_low": CLIP, "clip_high": CLIP, "curriculum": False,
        },
        "reference": {"path": str(folder / "reference")},
        "rollout": {
            "prompts_per_step": workload.prompts,
            "group_size": workload.group,
            "max_response_tokens": workload.response,
            "save": False,
            "deterministic": deterministic,
        },
        "verifier": {"rule": "python:owpo_megatron.bench.step_rule:grade"},
        "optimizer": {"steps": steps, "updates_per_step": 1, "lr": LEARNING_RATE, "clip_grad": CLIP_GRAD},
        "parallel": {"dp": ranks},
        "engine": {"count": engines},
        "eval": {"before": False, "after": False, "every": 0},
        "checkpoint": {"every": 0, "export_hf": False},
    }  # fmt: skip


def _write_model(folder: Path, workload: Workload, seed: int) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model = write_config(folder, _qwen3(workload))
    weights = dict(random_weights(model, torch.float32, seed=seed))
    _never_end(weights, workload)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    vocabulary = {f"t{index}": index for index in range(workload.end)} | {"<end>": workload.end}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [_special(workload.end)],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<end>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "pad_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _never_end(weights: dict[str, torch.Tensor], workload: Workload) -> None:
    """Scale the weights; keep the residual stream's first element constant, against which only the end token is."""
    for name, weight in weights.items():
        weight *= 1.0 if "norm" in name else SHARPER
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight[0] = 0
    weights["model.embed_tokens.weight"][:, 0] = CONSTANT
    weights["model.embed_tokens.weight"][workload.end, 0] = -CONSTANT


def _special(index: int) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": index, "content": "<end>"} | flags


def _qwen3(workload: Workload) -> Mapping[str, Any]:
    heads = 4
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": workload.hidden,
        "intermediate_size": 4 * workload.hidden,
        "num_hidden_layers": workload.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": workload.hidden // heads,
        "vocab_size": workload.vocab,
        "max_position_embeddings": 2048,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": workload.end,
        "dtype": "float32",
    }
