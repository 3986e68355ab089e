"""Weights at any parallel layout: from a converted folder to tp, pp, ep of 2, from each to the next, and back to HF.

Covered: every bit of every tensor after each load (gathered by named_weights) and after the export of what each layout
saved; the first families in `make test`, one shape of every other family in `make test-extra`, all shapes in
`make matrix`. Not covered: CUDA, Transformer Engine's grouped experts, experts that ranks share at ep > 1, more than
two ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import every_case
from layout_worker import walk_all
from rank_pool import Ranks
from safetensors.torch import load_file, save_file
from tiny import make_hf_model

from owpo_megatron.config import ParallelConfig
from owpo_megatron.conversion.export import hf_to_megatron, megatron_to_hf
from owpo_megatron.errors import UserError
from owpo_megatron.families import check_parallel, float32_tensors, read_hf_config

MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"tied": True, "vocab_size": 97},
    "qwen3": {"num_key_value_heads": 4, "vocab_size": 101},
    "qwen3_moe": {"norm_topk_prob": True, "vocab_size": 97},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"tied": True, "vocab_size": 5},
}
DENSE: list[dict[str, Any]] = [{"tp": 2}, {"pp": 2}]
EXPERTS: list[dict[str, Any]] = [
    {"tp": 2, "sp": True},
    {"dp": 2, "ep": 2},
    {"pp": 2},
    {"tp": 2, "sp": True, "etp": 1, "ep": 2},
    {"cp": 2, "ep": 2},
]
BFLOAT16 = {"qwen3", "mistral"}


def converted(folder: Path, family: str, fields: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A case for `walk`: a model in `dtype`, converted, without layouts."""
    hf = make_hf_model(folder / "hf", family, **fields)
    constants = float32_tensors(read_hf_config(hf))
    loaded = load_file(hf / "model.safetensors")
    tensors = {name: tensor if name in constants else tensor.to(dtype) for name, tensor in loaded.items()}
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    hf_to_megatron(hf, folder / "megatron")
    return {
        "name": family,
        "hf": str(hf),
        "megatron": str(folder / "megatron"),
        "out": str(folder),
        "dtype": str(dtype).removeprefix("torch."),
    }


def check(results: list[dict[str, Any]], cases: list[dict[str, Any]]) -> None:
    """Every load gave every bit, and so does the export of what each layout saved."""
    assert len(results) == sum(len(case["layouts"]) for case in cases)
    assert [found for found in results if not found["same"]] == []
    sources = {case["name"]: Path(case["hf"]) for case in cases}
    for found in results:
        folder = Path(found["folder"])
        megatron_to_hf(folder, folder / "back", proof=False)
        original = load_file(sources[found["case"]] / "model.safetensors")
        back = load_file(folder / "back" / "model.safetensors")
        assert back.keys() == original.keys()
        for name, tensor in original.items():
            assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), (found, name)


def test_every_layout_reads_what_every_other_saved(ranks: Ranks, tmp_path: Path) -> None:
    cases = []
    for family, fields in MODELS.items():
        dtype = torch.bfloat16 if family in BFLOAT16 else torch.float32
        layouts = EXPERTS if family == "qwen3_moe" else DENSE
        cases.append(converted(tmp_path / family, family, fields, dtype) | {"layouts": layouts})
    check(ranks.run(2, walk_all, cases)[0], cases)


def fits(hf: str, layout: dict[str, Any]) -> bool:
    try:
        check_parallel(read_hf_config(hf), ParallelConfig(**layout))
    except UserError:
        return False
    return True


ALL = [pytest.param(*case.values, id=case.id, marks=case.marks or pytest.mark.extra) for case in every_case()]


@pytest.mark.parametrize(("family", "shape"), ALL)
def test_every_family_in_every_layout_of_two_ranks(
    family: str, shape: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    """Weights are in bfloat16; a family's constants stay in float32."""
    case = converted(tmp_path, family, shape, torch.bfloat16)
    case["layouts"] = [layout for layout in EXPERTS[:4] if fits(case["hf"], layout)]
    assert len(case["layouts"]) >= 1
    check(ranks.run(2, walk_all, [case])[0], [case])
