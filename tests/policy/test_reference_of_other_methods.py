"""A run that is resumed with another method: what a checkpoint holds of a reference, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import make_config, make_hf_model

from owpo_megatron.config import ParallelConfig
from owpo_megatron.errors import UserError
from owpo_megatron.families import read_hf_config
from owpo_megatron.mcore.topology import init_topology
from owpo_megatron.policy import MegatronPolicy, SlotReference


@pytest.fixture(scope="module")
def topology() -> Any:
    return init_topology(ParallelConfig(), 1)


def reference(folder: Path, topology: Any, method: str) -> SlotReference:
    config = make_config(folder, algorithm={"name": method})
    kept = config.reference if method == "owpo" else None  # as trainer/build.py does
    hf = read_hf_config(folder)
    policy = MegatronPolicy(config.model, config.parallel, config.optimizer, kept, hf, topology, 1.0, {})
    return SlotReference(policy)


def test_a_method_without_a_reference_saves_none(tmp_path: Path, topology: Any) -> None:
    folder = make_hf_model(tmp_path / "model")
    dapo, owpo = (reference(folder, topology, method) for method in ("dapo", "owpo"))
    saved, kept = dapo.state_dict(), owpo.state_dict()
    assert (saved["kept"], saved["hash"]) == (False, "") and (kept["kept"], len(kept["hash"])) == (True, 64)
    with pytest.raises(UserError, match="written by a method that keeps no reference"):
        owpo.load_state_dict(saved)
    dapo.load_state_dict(kept | {"is_policy": False})  # the way out of a reference is open
    assert dapo.is_policy() and dapo.state_dict()["hash"] == ""
    owpo.load_state_dict(kept)
    without_the_field = {name: value for name, value in kept.items() if name != "kept"}
    owpo.load_state_dict(without_the_field)  # an older checkpoint
    with pytest.raises(RuntimeError, match="hashes to"):
        owpo.load_state_dict(kept | {"hash": "0" * 64})
