"""Weights at any parallel layout: from a converted folder to tp, pp, ep of 2, from each to the next, and back to HF.

Covered: every bit of every tensor after each load (gathered by named_weights) and after the export of what each layout
saved. Not covered: CUDA, Transformer Engine's grouped experts, tp > 1 with ep > 1, more than two ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from layout_worker import walk_all
from rank_pool import Ranks
from safetensors.torch import load_file, save_file
from tiny import make_hf_model

from owpo_megatron.conversion.export import hf_to_megatron, megatron_to_hf

MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"tied": True, "vocab_size": 97},
    "qwen3": {"num_key_value_heads": 4, "vocab_size": 101},
    "qwen3_moe": {"norm_topk_prob": True, "vocab_size": 97},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"tied": True, "vocab_size": 5},
}
DENSE: list[dict[str, Any]] = [{"tp": 2}, {"pp": 2}]
EXPERTS: list[dict[str, Any]] = [{"tp": 2, "sp": True}, {"dp": 2, "ep": 2}, {"pp": 2}, {"dp": 2, "ep": 2}]
BFLOAT16 = {"qwen3", "mistral"}


def test_every_layout_reads_what_every_other_saved(ranks: Ranks, tmp_path: Path) -> None:
    cases = []
    for family, fields in MODELS.items():
        hf = make_hf_model(tmp_path / family / "hf", family, **fields)
        dtype = torch.bfloat16 if family in BFLOAT16 else torch.float32
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(hf / "model.safetensors").items()}
        save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
        hf_to_megatron(hf, tmp_path / family / "megatron")
        cases.append(
            {
                "name": family,
                "hf": str(hf),
                "megatron": str(tmp_path / family / "megatron"),
                "out": str(tmp_path / family),
                "dtype": str(dtype).removeprefix("torch."),
                "layouts": EXPERTS if family == "qwen3_moe" else DENSE,
            }
        )
    results = ranks.run(2, walk_all, cases)[0]
    assert len(results) == sum(len(case["layouts"]) for case in cases)
    assert [found for found in results if not found["same"]] == []
    for found in results:
        folder = Path(found["folder"])
        megatron_to_hf(folder, folder / "back", proof=False)
        original = load_file(tmp_path / found["case"] / "hf" / "model.safetensors")
        back = load_file(folder / "back" / "model.safetensors")
        assert back.keys() == original.keys()
        for name, tensor in original.items():
            assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), (found, name)
