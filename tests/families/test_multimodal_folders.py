"""Folders that are published with a vision tower: the text model is taken out; training from the folder is refused.

Not covered: published checkpoints; Qwen3.5-MoE's, whose files hold all experts of a layer together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES
from safetensors.torch import load_file

from owpo_megatron.conversion.export import hf_to_megatron, megatron_to_hf
from owpo_megatron.errors import UserError
from owpo_megatron.families.config_file import refuse_multimodal

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
def test_the_text_model_is_taken_out(kind: str, text: str, vision: dict[str, Any], tmp_path: Path) -> None:
    """The export is a folder of the text model alone, which transformers loads and computes the same with."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, text_config=TEXT | CASES[text][0], vision_config=vision, mm_tokens_per_image=4)
    whole = AutoModelForImageTextToText.from_config(config).float().eval()
    whole.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "LICENSE").write_text("a licence")
    with pytest.raises(UserError, match="holds a text model beside others; convert it, which takes the text model out"):
        refuse_multimodal(tmp_path / "hf", "model.path")

    proof = hf_to_megatron(tmp_path / "hf", tmp_path / "megatron").proof
    assert proof is not None and proof.ok
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = tmp_path / "back"
    assert json.loads((back / "config.json").read_text())["model_type"] == text
    assert (back / "LICENSE").read_text() == "a licence"
    refuse_multimodal(back, "model.path")
    original = {name.split("language_model.")[-1]: tensor for name, tensor in whole.state_dict().items()}
    for name, tensor in load_file(back / "model.safetensors").items():
        if ".experts." not in name:  # which modules hold together
            assert torch.equal(tensor, original.get(name.removeprefix("model."), original.get(name)))
    alone = AutoModelForCausalLM.from_pretrained(back).eval()
    ids = torch.tensor([[5, 9, 40, 17, 3, 88]])
    with torch.no_grad():
        assert torch.allclose(alone(ids).logits, whole(input_ids=ids).logits, atol=1e-5)
