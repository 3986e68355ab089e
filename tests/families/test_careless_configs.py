"""Odd config.json files: each is read as transformers would, or refused in one line with field, value and remedy.

Not covered: fields that a family does not read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel, Rope, read_hf_config

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
    "num_attention_heads": 4, "vocab_size": 97, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GONE = object()  # a field that the file lacks


def read(folder: Path, fields: dict[str, Any]) -> HFModel:
    config = {name: value for name, value in (LLAMA | fields).items() if value is not GONE}
    (folder / "config.json").write_text(json.dumps(config))
    return read_hf_config(folder)


@pytest.mark.parametrize("given", [GONE, None])
def test_without_key_value_heads_every_head_has_its_own(given: Any, tmp_path: Path) -> None:
    assert read(tmp_path, {"num_key_value_heads": given}).attention.num_kv_heads == 4


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_both_names_of_the_dtype(field: str, tmp_path: Path) -> None:
    assert read(tmp_path, {field: "bfloat16"}).hidden_size == 48


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, Rope(5e5)),
        ({"type": "linear", "factor": 2.0}, Rope(5e5, linear_factor=2.0)),
        ({"rope_type": "linear", "factor": 2}, Rope(5e5, linear_factor=2.0)),
        (LLAMA3 | {"rope_type": "llama3"}, Rope(5e5, llama3_factor=8.0)),
        (LLAMA3 | {"type": "llama3"}, Rope(5e5, llama3_factor=8.0)),
    ],
)
def test_older_and_newer_names_of_rope_scaling(scaling: Any, expected: Rope, tmp_path: Path) -> None:
    assert read(tmp_path, {"rope_scaling": scaling}).rope == expected


def test_yarn_without_the_original_length_has_it_from_the_config(tmp_path: Path) -> None:
    yarn = read(tmp_path, {"rope_scaling": {"type": "yarn", "factor": 4.0}}).rope.yarn
    assert yarn is not None and yarn.original_positions == 256


DEEPSEEK = {
    "model_type": "deepseek_v3", "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4,
    "moe_intermediate_size": 32, "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "rms_norm_eps": 1e-6, "num_key_value_heads": 4,
}  # fmt: skip
REFUSED: list[tuple[dict[str, Any], str]] = [
    *[
        ({name: GONE}, rf"config.json {name} = \(missing\): add the model's own; transformers would take that of its")
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    ],
    ({"model_type": GONE}, r"model_type \(missing\) is not supported; supported: llama, mistral"),
    ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported; supported: llama, mistral"),
    ({"num_hidden_layers": "4"}, "num_hidden_layers = 4: give a whole number above 0"),
    ({"hidden_size": -48}, "hidden_size = -48: give a whole number above 0"),
    ({"num_key_value_heads": 0}, "num_key_value_heads = 0: give a whole number above 0, or leave it out"),
    ({"num_key_value_heads": 3}, r"num_key_value_heads = 3: must divide num_attention_heads \(4\)"),
    ({"head_dim": 7}, "head_dim = 7: must be even"),
    ({"torch_dtype": "torch.bfloat16"}, "torch_dtype = torch.bfloat16: give one of float32, bfloat16"),
    ({"dtype": "int8"}, "dtype = int8: give one of float32, bfloat16"),
    ({"rope_theta": None}, "rope_theta = None: give a number above 0"),
    ({"rope_scaling": "linear"}, "rope_scaling = linear: give null or an object, e.g. "),
    ({"rope_scaling": {"type": "linear"}}, "Missing required keys in `rope_parameters` .*factor"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_parameters.factor = 2: give a number above 0"),
    ({"rope_scaling": {"type": "yarn", "factor": 0}}, "rope_parameters.factor = 0: give a number above 0"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type = dynamic: not supported; use default, linear"),
    (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6, "factor": 4.0}},
        "rope_type = longrope: not supported; use default, linear",
    ),
    ({"rope_scaling": {"type": "banana"}}, "rope_type = banana: not supported; use default, linear"),
    ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method = bitsandbytes: only mxfp4, and fp8"),
    ({"quantization_config": {"load_in_8bit": True}}, "quant_method = None: only mxfp4, and fp8"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quant_method = gptq: .* give the unquantised model"),
    ({"quantization_config": {"quant_method": "awq"}}, "quant_method = awq: .* give the unquantised model"),
    ({"quantization_config": "awq"}, "quantization_config.quant_method = awq: only mxfp4"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config.quant_method = compressed"),
    (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
        r"weight_block_size = \[128\]: give rows and columns of a block",
    ),
    ({"layer_types": ["chunked_attention"] * 4}, "layer_types = chunked_attention: not supported; use full_attention"),
    ({"model_type": "llava", "text_config": LLAMA}, "model_type llava is not supported; supported: llama, mistral"),
    (DEEPSEEK | {"n_routed_experts": 6}, r"n_group = 4: must divide the number of experts \(6\)"),
    (DEEPSEEK | {"topk_group": 5}, r"topk_group = 5: must be at most n_group \(4\)"),
    (DEEPSEEK | {"topk_group": 1}, "num_experts_per_tok = 4: must be between 1 and the 2 experts that there are"),
    (
        {"model_type": "qwen3_5_text", "linear_num_key_heads": 3, "linear_num_value_heads": 4},
        r"linear_num_value_heads = 4: must be a multiple of linear_num_key_heads \(3\)",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refused_in_one_line(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as refused:
        read(tmp_path, fields)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
