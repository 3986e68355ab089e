"""Every family in a real SGLang server: trained weights are pushed, hashes and log-probs compared with the trainer's.

One shape per family in `make test-extra`, all of them in `make matrix`. Not covered: CUDA, tensor-parallel engines.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import every_case
from tiny import build_policy, make_config, make_hf_model, random_samples

from owpo_megatron.config import EngineConfig, SyncConfig
from owpo_megatron.engine import start_fleet
from owpo_megatron.families import EngineLayout
from owpo_megatron.families.catalogue import MODEL_TYPES, family_of
from owpo_megatron.methods import make_method
from owpo_megatron.sync import make_sync
from owpo_megatron.types import Prompt, Sample, SampleRequest, Sampling

pytestmark = pytest.mark.server

REQUESTS = [SampleRequest(Prompt(f"p/{i}", (5, 9, 40 + i, 17), "", ""), seed=900 + i) for i in range(4)]
LLAMA_SHAPED: dict[str, list[dict[str, Any]]] = {
    "qwen3": [{"tied": True}, {"vocab_size": 97}],
    "qwen2": [{"vocab_size": 97}, {"tied": True}],
    "llama": [{"tied": True, "vocab_size": 101}, {"num_key_value_heads": 4}],
    "mistral": [{"vocab_size": 101}, {"num_key_value_heads": 1}],
    "qwen3_moe": [{"norm_topk_prob": True}, {"num_experts": 6, "vocab_size": 97}],
}
NOT_SERVED = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
ALL = [
    *(
        pytest.param(*case.values, id=case.id, marks=case.marks or pytest.mark.extra)
        for case in every_case()
        if case.values[0] not in NOT_SERVED
    ),
    *(
        pytest.param(family, shape, id=f"{family}-{number}", marks=pytest.mark.matrix if number else pytest.mark.extra)
        for family, shapes in LLAMA_SHAPED.items()
        for number, shape in enumerate(shapes)
    ),
]


def test_every_family_is_served() -> None:
    """But Kimi-K2, which SGLang knows by code in the published folder alone, and delta nets (docs/families.md)."""
    assert {case.values[0] for case in ALL} == set(MODEL_TYPES) - {"kimi_k2", *NOT_SERVED}


def as_published(hf: Path) -> None:
    """OLMo-3's rope fields as its published configs have them; SGLang 0.5.21 fails on those of transformers 5."""
    config = json.loads((hf / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    (hf / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(("family", "shape"), ALL)
def test_trainer_and_engine_agree(family: str, shape: dict[str, Any], engine_python: Path, tmp_path: Path) -> None:
    """The server starts with weights of its own; what it computes with came by the push of an updated policy."""
    if not family_of(family, "").engine.windows and "sliding_window" in shape:
        shape = shape | {"sliding_window": 64}  # SGLang has none: longer sequences are refused
    if family == "gemma3_text":  # as published: SGLang always ties its head, and does not pad its embedding
        shape = shape | {"tied": True, "vocab_size": 128}
    hf = make_hf_model(tmp_path / "hf", family, **(shape | {"eos_token_id": 2}))
    if family == "olmo3":
        as_published(hf)
    policy = build_policy(make_config(hf))
    policy.update(random_samples(3, vocab_size=90, logps=False), make_method("grpo"))
    config = EngineConfig(python=engine_python, device="cpu", max_restarts=0)
    with start_fleet(config, hf, "float32", {"load_format": "dummy"}, tmp_path / "logs") as fleet:
        layout = EngineLayout.of(policy.hf)
        with closing(make_sync(SyncConfig(verify="hash"), fleet.clients, tmp_path / "sync", layout)) as sync:
            sync.push(policy.named_weights(), 1)
        rollouts = list(fleet.generate(REQUESTS, Sampling(12)))
    samples = [
        Sample(tuple(r.prompt.token_ids), tuple(r.response_ids), 0.0, False, tuple(r.behaviour_logp)) for r in rollouts
    ]
    for rollout, logp_L in zip(rollouts, policy.logprobs(samples), strict=True):
        assert (logp_L - torch.tensor(rollout.behaviour_logp)).abs().max() < 1e-4
    assert sum(len(sample.response_ids) for sample in samples) > 8
