"""Folders that are published with a vision tower: refused, and the way that docs/families.md gives instead.

Not covered: published checkpoints, Gemma-3 in the tier before every change (`extra`).
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES
from safetensors.torch import load_file

from owpo_megatron.conversion.export import hf_to_megatron
from owpo_megatron.data.tokenizer import make_byte_tokenizer
from owpo_megatron.errors import UserError
from owpo_megatron.families import read_hf_config

ROOT = Path(__file__).parents[2]
TEXT: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None, "eos_token_id": None,
}  # fmt: skip
QWEN_VISION = {
    "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 48, "patch_size": 4,
    "num_position_embeddings": 16,
}  # fmt: skip
GEMMA_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "text", "vision"),
    [
        pytest.param("qwen3_5", "qwen3_5_text", QWEN_VISION),
        pytest.param("qwen3_5_moe", "qwen3_5_moe_text", QWEN_VISION, marks=pytest.mark.extra),
        pytest.param("gemma3", "gemma3_text", GEMMA_VISION, marks=pytest.mark.extra),
    ],
)
def test_the_text_model_is_taken_out(
    kind: str, text: str, vision: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    sizes = TEXT | CASES[text][0] | {"vocab_size": 300}
    config = AutoConfig.for_model(kind, text_config=sizes, vision_config=vision)
    model = AutoModelForImageTextToText.from_config(config).float()
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    model.save_pretrained(whole)
    make_byte_tokenizer(300).save_pretrained(whole)
    with pytest.raises(UserError, match=f"{kind} is a {text} model beside others; .*docs/families.md shows"):
        read_hf_config(whole)

    (code,) = re.findall(
        r"<!-- file: text_model.py -->\n```python\n(.*?)```", (ROOT / "docs/families.md").read_text(), re.DOTALL
    )
    (tmp_path / "text_model.py").write_text(code)
    gemma = ["gemma"] if kind == "gemma3" else []
    monkeypatch.setattr(sys, "argv", ["text_model.py", str(whole), str(alone), *gemma])
    runpy.run_path(str(tmp_path / "text_model.py"))
    proof = hf_to_megatron(alone, tmp_path / "megatron").proof
    assert proof is not None and proof.ok
    taken, (name,) = load_file(alone / "model.safetensors"), ["layers.3.self_attn.k_proj.weight"]
    original = {own.split("language_model.")[-1]: tensor for own, tensor in model.state_dict().items()}
    assert torch.equal(taken[f"model.{name}"], original[name])
