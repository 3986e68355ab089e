"""Log-probs and entropies of the megatron model against transformers, one process, fp32.

Covered: Qwen2.5, Qwen3 and Llama shapes, tied and untied, llama3 rope scaling, a vocabulary that needs padding rows,
temperatures other than 1, a sequence of 200 tokens packed with short ones.
Not covered: bfloat16, Transformer Engine's layers (the parity test covers tensor and pipeline parallelism).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import sequence_logp
from tiny import build_policy, make_config, make_hf_model, random_samples
from transformers import AutoModelForCausalLM

from owpo_megatron.families import padded_vocab_size
from owpo_megatron.methods import make_method
from owpo_megatron.types import Sample

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {}),
    "qwen3_tied": ("qwen3", {"tied": True}),
    "llama": ("llama", {}),
    "llama_tied": ("llama", {"tied": True}),
    "llama3_rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "odd_vocabulary": ("qwen3", {"vocab_size": 101, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "odd_vocabulary_tied": ("qwen2", {"vocab_size": 101, "tied": True}),
}


def long_sample(length: int) -> Sample:
    """One prompt token and a response of `length` tokens."""
    ids = torch.randint(0, 96, (length + 1,), generator=torch.Generator().manual_seed(1)).tolist()
    return Sample((ids[0],), tuple(ids[1:]), 1.0, True, behaviour_logp=(-4.0,) * length)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("name", list(MODELS))
def test_log_probs_of_a_pack(name: str, temperature: float, tmp_path: Path) -> None:
    family, fields = MODELS[name]
    folder = make_hf_model(tmp_path / "model", family, **fields)
    config = make_config(folder, rollout={"temperature": temperature}, optimizer={"tokens_per_microbatch": 230})
    samples = [*random_samples(0, logps=False), long_sample(200)]
    found = build_policy(config).logprobs(samples)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    for sample, logp in zip(samples, found, strict=True):
        with torch.no_grad():
            expected = sequence_logp(model, sample, temperature)
        assert logp.dtype == torch.float32 and logp.shape == expected.shape
        torch.testing.assert_close(logp, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "odd_vocabulary", "odd_vocabulary_tied"])
def test_whole_distribution(name: str, tmp_path: Path) -> None:
    """Every token of the vocabulary as the response to one prompt: the full log-softmax, without padding rows."""
    family, fields = MODELS[name]
    folder = make_hf_model(tmp_path / "model", family, **fields)
    vocab_size = fields.get("vocab_size", 96)
    policy = build_policy(make_config(folder, optimizer={"tokens_per_microbatch": 100}))
    padded = policy._chunks[0].module.embedding.word_embeddings.weight.shape[0]
    assert padded == padded_vocab_size(vocab_size, 1) and (padded > vocab_size) == name.startswith("odd")
    prompt = (5, 17, 3)
    samples = [Sample(prompt, (token,), 1.0, True, (-1.0,)) for token in range(vocab_size)]
    logp_V = torch.cat(policy.logprobs(samples))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected_V = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(logp_V, expected_V, rtol=0, atol=1e-5)
    assert abs(float(logp_V.exp().sum()) - 1) < 1e-5


def test_entropy_and_mismatch_sums(tmp_path: Path) -> None:
    """Metrics of an update besides the method's, over the tokens that are not masked, at a temperature."""
    folder = make_hf_model(tmp_path / "model", vocab_size=101)
    samples = random_samples(3)
    config = make_config(folder, rollout={"temperature": 0.8})
    sums = build_policy(config).update(samples, make_method("dapo"))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    entropy, tokens, gap = 0.0, 0, 0.0
    for sample in (sample for sample in samples if not sample.masked):
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        with torch.no_grad():
            logp_LV = (model(ids).logits[0, len(sample.prompt_ids) - 1 : -1] / 0.8).log_softmax(-1)
        entropy -= float((logp_LV.exp() * logp_LV).sum())
        tokens += len(sample.response_ids)
        assert sample.old_logp is not None
        gap += float((sample.old_logp - torch.tensor(sample.behaviour_logp)).abs().sum())
    assert sums["loss_count"] == tokens
    assert sums["entropy_sum"] == pytest.approx(entropy, rel=1e-5)
    assert sums["mismatch_sum"] == pytest.approx(gap, abs=1e-6)


def test_mismatch_is_between_old_and_behaviour(tmp_path: Path) -> None:
    samples = [
        replace(sample, behaviour_logp=tuple(value - 0.25 for value in sample.behaviour_logp))
        for sample in random_samples(3, count=3)
    ]
    sums = build_policy(make_config(make_hf_model(tmp_path / "model"))).update(samples, make_method("dapo"))
    assert sums["mismatch_sum"] == pytest.approx(0.25 * sums["loss_count"], rel=1e-4)
