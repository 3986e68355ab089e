"""Walks weights through parallel layouts: each loads what the one before saved, and says whether it has every bit.

layout_worker.py CASES.json  with  [{"hf": folder, "megatron": converted folder, "out": folder, "layouts": [...]}, ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def walk(case: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import load_file
    from tiny import build_policy, make_config, report

    from owpo_megatron.config import HF_FILES
    from owpo_megatron.conversion import carry_files

    original = load_file(Path(case["hf"]) / "model.safetensors")
    source = Path(case["megatron"])
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
        report(policy.topology, case=case["name"], layout=layout, same=bool(same), folder=str(folder))
        source = folder


def main() -> None:
    from owpo_megatron.mcore.topology import close_topology

    for case in json.loads(Path(sys.argv[1]).read_text()):
        walk(case)
    close_topology()


if __name__ == "__main__":
    main()
