"""Sharded checkpoints written without a model: what megatron's own save would hold, and single tensors read back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_hf_model

from owpo_megatron.config import ParallelConfig
from owpo_megatron.families import HFReader, megatron_names, place_of, read_hf_config, to_megatron
from owpo_megatron.mcore import checkpoint, sharded_files
from owpo_megatron.mcore.layerwise import one_rank
from owpo_megatron.mcore.names import named_shards
from owpo_megatron.mcore.sharded_files import StoredState
from owpo_megatron.mcore.spec import transformer_config
from owpo_megatron.mcore.transformer import build_chunks


def contents(state: StoredState) -> dict[str, Any]:
    return {key: (tuple(stored.size), stored.properties.dtype) for key, stored in state._tensors.items()}


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(
    ("family", "fields"), [("qwen2", {"tied": True, "vocab_size": 97}), ("qwen3", {}), ("qwen3_moe", {})]
)
def test_the_same_as_megatrons_own_save(
    family: str, fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys, shapes, dtypes and bits; and megatron's own loading reads ours into a model."""
    monkeypatch.setattr(sharded_files, "_BLOB_BYTES", 1000)  # several blobs per tensor
    hf = make_hf_model(tmp_path / "hf", family, **fields)
    model, reader = read_hf_config(hf), HFReader(hf)
    (tmp_path / "ours").mkdir()
    (tmp_path / "theirs").mkdir()
    with sharded_files.PartFile(tmp_path / "ours", 0) as part:
        for name in megatron_names(model):
            place = place_of(model, name)
            tensor = to_megatron(model, name, reader)
            part.add(f"model.{place.name}", place.index, place.leading, tensor, blocks=place.blocks)
    assert sharded_files.part_is_whole(tmp_path / "ours", part.entries)
    sharded_files.finish_state(tmp_path / "ours", part.entries)
    with one_rank():
        config = transformer_config(model, ParallelConfig(), torch.float32, {})
        chunks = build_chunks(model, config, temperature=1.0)
        checkpoint.load_weights(tmp_path / "ours", chunks)
        for name, param in named_shards(chunks):
            assert torch.equal(param, to_megatron(model, name, reader)), name
        checkpoint.save_weights(tmp_path / "theirs", chunks)
    ours, theirs = StoredState(tmp_path / "ours"), StoredState(tmp_path / "theirs")
    assert contents(ours) == contents(theirs)
    assert len(ours._tensors["model.decoder.layers.self_attention.linear_qkv.weight"].chunks) > model.num_layers
    for name in megatron_names(model):
        place = place_of(model, name)
        whole = ours.tensor(f"model.{place.name}", place.index)
        assert torch.equal(whole, theirs.tensor(f"model.{place.name}", place.index)), name
        assert torch.equal(whole[1:3], ours.tensor(f"model.{place.name}", place.index, rows=(1, 3))), name


def test_a_part_that_lost_its_end_is_not_whole(tmp_path: Path) -> None:
    with sharded_files.PartFile(tmp_path, 3) as part:
        part.add("a", (0,), (2,), torch.ones(4, 3))
    assert sharded_files.part_is_whole(tmp_path, part.entries)
    file = tmp_path / "__3_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    assert not sharded_files.part_is_whole(tmp_path, part.entries)
    file.unlink()
    assert not sharded_files.part_is_whole(tmp_path, part.entries)


def test_an_entry_that_was_never_written_is_not_read(tmp_path: Path) -> None:
    with sharded_files.PartFile(tmp_path, 0) as part:
        part.add("a", (0,), (2,), torch.ones(4, 3))
    sharded_files.finish_state(tmp_path, part.entries)
    state = StoredState(tmp_path)
    assert torch.equal(state.tensor("a", (0,)), torch.ones(4, 3))
    with pytest.raises(AssertionError, match=r"a \(1,\) is stored in part only"):
        state.tensor("a", (1,))


def test_an_entry_is_whole_while_another_thread_looks_for_its_own(tmp_path: Path) -> None:
    """Threads of a conversion share one reader: one entry is read in the middle of the search for another."""
    with sharded_files.PartFile(tmp_path, 0) as part:
        for expert in range(3):
            part.add("a", (expert,), (3,), torch.full((4, 2), float(expert)), blocks=2)
    sharded_files.finish_state(tmp_path, part.entries)
    state = StoredState(tmp_path)
    inner: list[torch.Tensor] = []

    class Interrupted(list):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Any]:
            for place, chunk in enumerate(list.__iter__(self)):
                if place == 3 and not inner:  # one of the second expert's two shards has been seen
                    inner.append(torch.empty(0))
                    inner[0] = state.tensor("a", (1,))
                yield chunk

    stored = state._tensors["a"]
    stored.chunks = Interrupted(stored.chunks)
    assert torch.equal(state.tensor("a", (2,)), torch.full((4, 2), 2.0))
    assert torch.equal(inner[0], torch.ones(4, 2)), "the other thread's entry"
