"""Tokens per second and MFU, worked by hand; FLOPs of a forward pass against PyTorch's own count."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from tiny import make_hf_model

from owpo_megatron.config import ProfileConfig
from owpo_megatron.families import forward_flops, read_hf_config
from owpo_megatron.run.speed import Speed, peak_flops
from owpo_megatron.trainer.profile import StepProfiler


def test_a_line_by_hand() -> None:
    """10 samples of 20 tokens: a forward pass is 100 + 2 * 20 = 140 FLOPs per token; an update is three of them."""
    speed = Speed(matmul_flops=100.0, attention_flops=2.0, ranks=4, peak=1000.0)
    line = {
        "tokens_generated": 50, "tokens_packed": 200, "samples_trained": 10,
        "seconds": {"rollout": 5.0, "logp_old": 20.0, "update": 42.0},
    }  # fmt: skip
    assert speed.of(line) == {
        "tokens_per_second_rollout": 10.0,
        "tokens_per_second_logp_old": 10.0,
        "mfu_logp_old": 0.35,  # 200 * 140 / (20 * 4 * 1000)
        "tokens_per_second_update": 4.8,
        "mfu_update": 0.5,  # 3 * 200 * 140 / (42 * 4 * 1000)
    }
    no_peak = Speed(100.0, 2.0, 4)
    assert not [name for name in no_peak.of(line) if name.startswith("mfu")]
    assert no_peak.of({"seconds": {"total": 1.0}}) == {}


def test_the_flops_of_chosen_experts_by_hand(tmp_path: Path) -> None:
    """A layer: q, k, v, o 48 * (64 + 32 + 32 + 64) = 9216, router 48 * 4 = 192, two of four experts 2 * 3 * 48 * 32 =
    9216; four layers and the head 96 * 48: 79,104 parameters. Attention: 2 * 4 layers * 64. PyTorch's counter does not
    know the grouped products of transformers' experts."""
    shape = read_hf_config(make_hf_model(tmp_path / "moe", "qwen3_moe"))
    assert forward_flops(shape) == (2 * 79_104, 512.0)


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_the_flops_are_those_that_pytorch_counts(family: str, tmp_path: Path) -> None:
    """PyTorch counts attention's whole square; the causal half of it is ours."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    folder = make_hf_model(tmp_path / family, family)
    shape = read_hf_config(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokens = 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(1, tokens + 1)[None])
    matmul, attention = forward_flops(shape)
    # scores and values over the whole square: 2 * 2 * width * tokens per token and layer, twice our causal count
    rope = 2 * 8 * tokens  # inverse frequencies times positions
    assert counter.get_total_flops() == pytest.approx(tokens * (matmul + 2 * attention * tokens) + rope, rel=0.01)


def test_peaks_by_name() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bfloat16") == 312e12
    assert peak_flops("NVIDIA H200", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H200", "float32") is None and peak_flops(None, "bfloat16") is None
    assert peak_flops("Some other card", "bfloat16") is None


def test_the_steps_that_are_asked_for_are_profiled(tmp_path: Path) -> None:
    config = ProfileConfig(steps=[2])
    for rank in (0, 1):
        profiler = StepProfiler(config, tmp_path, rank)
        for step in (1, 2, 3):
            with profiler.around(step):
                torch.ones(64, 64) @ torch.ones(64, 64)
    (file,) = tmp_path.iterdir()
    assert file.name == "step_000002_rank_0.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert any(event.get("name") == "aten::mm" for event in events)
