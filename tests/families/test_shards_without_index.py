"""Shards without an index file, as in some uploads: each file lists its tensors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from owpo_megatron.errors import UserError
from owpo_megatron.families.reader import HFReader


def test_every_shard_is_read(tmp_path):
    save_file({"a": torch.arange(4.0)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"b": torch.arange(6.0).reshape(2, 3)}, tmp_path / "model-00002-of-00002.safetensors")
    reader = HFReader(tmp_path)
    assert sorted(reader.names()) == ["a", "b"] and reader.shape("b") == (2, 3)
    assert torch.equal(reader.tensor("a"), torch.arange(4.0))


def test_two_files_with_one_tensor_are_refused(tmp_path):
    for name in ("one", "two"):
        save_file({"a": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match="holds a, and so does one.safetensors"):
        HFReader(tmp_path)
