"""Prints one JSON line about the torch of this interpreter (facts.py asks)."""

from __future__ import annotations

import importlib
import importlib.util
import json
from typing import Any

import torch

facts: dict[str, Any] = {"version": torch.__version__, "file": torch.__file__}
version = getattr(torch, "version", None)
facts["cuda"] = getattr(version, "cuda", None)
if hasattr(torch, "cuda"):
    facts["cuda_available"] = torch.cuda.is_available()
    if torch.cuda.is_available():
        facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts["devices"] = [
            {
                "name": torch.cuda.get_device_name(index),
                "capability": list(torch.cuda.get_device_capability(index)),
                "free_bytes": torch.cuda.mem_get_info(index)[0],
                "total_bytes": torch.cuda.mem_get_info(index)[1],
            }
            for index in range(torch.cuda.device_count())
        ]
for module in ("transformer_engine", "apex"):
    if importlib.util.find_spec(module) is None:
        continue
    try:
        # transformer_engine alone imports lazily: its torch part is what megatron needs
        importlib.import_module({"transformer_engine": "transformer_engine.pytorch"}.get(module, module))
        facts[module] = "works"
    except Exception as error:
        facts[module] = f"{type(error).__name__}: {error}".splitlines()[0]
if facts.get("cuda_available"):
    from owpo_megatron.mcore.fusions import available

    facts["fused_by"] = sorted(available())
print(json.dumps(facts))
