"""Walks weights through parallel layouts: each loads what the one before saved, and is compared bit by bit.

A case is {"name": ..., "hf": folder, "megatron": converted folder, "out": folder, "dtype": ..., "layouts": [...]}.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def walk(case: dict[str, Any]) -> list[dict[str, Any]]:
    import torch
    from safetensors.torch import load_file
    from tiny import build_policy, make_config

    from owpo_megatron.config import HF_FILES
    from owpo_megatron.conversion import carry_files

    original = load_file(Path(case["hf"]) / "model.safetensors")
    source, found = Path(case["megatron"]), []
    for number, layout in enumerate(case["layouts"]):
        policy = build_policy(make_config(source, parallel=layout, model={"dtype": case["dtype"]}))
        weights = {name: tensor.clone() for name, tensor in policy.named_weights()}
        folder = Path(case["out"]) / str(number)
        if policy.topology.is_main:
            (folder / "state").mkdir(parents=True)
            (folder / HF_FILES).mkdir()
            carry_files(Path(case["hf"]), folder / HF_FILES)
            (folder / "manifest.json").write_text("{}")  # as of a run
        policy.topology.barrier()
        policy.save_weights(folder / "state")
        same = policy.topology.is_main and weights.keys() == original.keys()
        same = same and all(torch.equal(weights[name], tensor) for name, tensor in original.items())
        found.append({"case": case["name"], "layout": layout, "same": bool(same), "folder": str(folder)})
        source = folder
    return found


def walk_all(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [found for case in cases for found in walk(case)]
