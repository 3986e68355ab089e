"""Quantisation on the way to engines in block FP8: numerics, names, and SGLang's own reading of what is sent.

Not covered: an engine that runs in FP8. SGLang needs a CUDA device for it; nothing of this has run on one.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from owpo_megatron.sync.fp8 import BLOCK, engine_arguments, quantize_blocks, quantized


def dequantized(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    N, K = values.shape
    return values.float() * scales.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (200, 130), (1, 5)])
def test_error_is_half_a_step_of_e4m3(shape: tuple[int, int]) -> None:
    """Whole and ragged blocks of sizes nine orders of magnitude apart, and weights of all sizes inside a block."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = -(-shape[0] // BLOCK), -(-shape[1] // BLOCK)
    block_size = 10.0 ** torch.randint(-6, 4, (rows, columns), generator=generator)
    weight = torch.randn(shape, generator=generator) * 10.0 ** torch.empty(shape).uniform_(-3, 0, generator=generator)
    weight *= block_size.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]
    values, scales = quantize_blocks(weight)
    assert values.dtype == torch.float8_e4m3fn and values.shape == shape and values.is_contiguous()
    assert scales.dtype == torch.float32 and scales.shape == (rows, columns)
    error = (dequantized(values, scales) - weight).abs()
    step = scales.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]] * 2.0**-10
    assert (error <= torch.maximum(weight.abs() / 16, step) * (1 + 1e-5)).all()


def test_what_e4m3_can_say_is_kept_exactly() -> None:
    """One block: 448 is its largest, so the scale is 1 and 1.125 = 1 + 1/8 fits three bits; 1.0625 rounds to even, 1.

    The other block is zeros: no division by zero, and zeros come back.
    """
    weight = torch.zeros(128, 256)
    weight[0, :4] = torch.tensor([448.0, 1.125, -0.0625, 1.0625])
    values, scales = quantize_blocks(weight)
    assert scales[0, 0] == 1.0
    assert dequantized(values, scales)[0, :4].tolist() == [448.0, 1.125, -0.0625, 1.0]
    assert torch.equal(dequantized(values, scales)[:, 128:], torch.zeros(128, 128))


def test_linear_layers_are_quantised_and_nothing_else() -> None:
    kept = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.0.mlp.gate.weight"]
    kept += ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_norm.weight"]
    linear = ["model.layers.0.self_attn.o_proj.weight", "model.layers.3.mlp.experts.7.down_proj.weight"]
    sent = dict(quantized((name, torch.ones(4, 4, dtype=torch.bfloat16)) for name in kept + linear))
    assert sent.keys() == {*kept, *linear, *(f"{name}_scale_inv" for name in linear)}
    assert {sent[name].dtype for name in kept} == {torch.bfloat16}
    assert {sent[name].dtype for name in linear} == {torch.float8_e4m3fn}


def test_engine_starts_in_block_fp8_whatever_else_is_overridden() -> None:
    arguments = engine_arguments({"json_model_override_args": '{"rope_theta": 5}'})
    override = json.loads(arguments["json_model_override_args"])
    assert override["rope_theta"] == 5
    assert override["quantization_config"]["weight_block_size"] == [128, 128]


@pytest.mark.slow
@pytest.mark.process
def test_sglang_reads_it_as_the_weight(engine_python: Path, tmp_path: Path) -> None:
    """SGLang's own configuration class accepts ours, and its own block_quant_dequant gives our weight back."""
    weight = torch.randn(200, 384, generator=torch.Generator().manual_seed(2)) * 0.02
    values, scales = quantize_blocks(weight)
    save_file({"values": values, "scales": scales, "back": dequantized(values, scales)}, tmp_path / "w.safetensors")
    code = (
        "import json, sys, torch\n"
        "from safetensors.torch import load_file\n"
        "from sglang.srt.layers.quantization.fp8 import Fp8Config\n"
        "from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant\n"
        "config = Fp8Config.from_config(json.loads(sys.argv[1])['quantization_config'])\n"
        "w = load_file(sys.argv[2])\n"
        "assert config.is_checkpoint_fp8_serialized and config.weight_block_size == [128, 128]\n"
        "back = block_quant_dequant(w['values'], w['scales'], config.weight_block_size, torch.float32)\n"
        "assert torch.equal(back, w['back'])\n"
        "print('read')"
    )
    arguments = [engine_arguments({})["json_model_override_args"], tmp_path / "w.safetensors"]
    done = subprocess.run([engine_python, "-c", code, *arguments], capture_output=True, text=True)
    assert done.stdout.endswith("read\n"), done.stderr[-2000:]
