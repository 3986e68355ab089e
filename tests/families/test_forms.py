"""Forms of weights besides safetensors: .bin files, GGUF, FP8 with a scale per block.

Not covered: files larger than memory, and the published checkpoints that come in these forms.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from family_cases import CASES
from safetensors.torch import load_file, save_file
from tiny import make_hf_model

from owpo_megatron.conversion.export import hf_to_megatron, megatron_to_hf
from owpo_megatron.errors import UserError
from owpo_megatron.families import HFReader, float32_tensors, read_hf_config


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return make_hf_model(tmp_path / "hf", "qwen3", vocab_size=97)


def as_bin(folder: Path, shards: int, legacy: bool = False) -> dict[str, torch.Tensor]:
    """Put the folder's weights into .bin files; the tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    files = {f"pytorch_model-{n + 1:05d}-of-{shards:05d}.bin": names[n::shards] for n in range(shards)}
    if shards == 1:
        files = {"pytorch_model.bin": names}
    else:
        weight_map = {name: file for file, some in files.items() for name in some}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, some in files.items():
        part = {name: tensors[name] for name in some}
        torch.save(part, folder / file, _use_new_zipfile_serialization=not legacy)
    return tensors


@pytest.mark.parametrize(("shards", "legacy"), [(1, False), (3, False), (1, True)])
def test_bin_files(hf: Path, tmp_path: Path, shards: int, legacy: bool) -> None:
    original = as_bin(hf, shards, legacy)
    hf_to_megatron(hf, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())
    assert not list((tmp_path / "back").glob("*.bin*"))


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("executed",))


def test_a_bin_file_that_would_execute_something_is_refused(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hf / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Harmful()}, hf / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: not a whole file of weights alone"):
        HFReader(hf)
    (hf / "pytorch_model.bin").write_bytes(b"cut")
    with pytest.raises(UserError, match="pytorch_model.bin: not a whole file of weights alone"):
        HFReader(hf)
    assert "executed" not in capsys.readouterr().out


def test_gguf_is_refused_with_a_pointer(hf: Path, tmp_path: Path) -> None:
    (hf / "model.safetensors").rename(hf / "model.gguf")
    with pytest.raises(UserError, match="holds GGUF files, .* give the HF folder they were made from"):
        HFReader(hf)
    (hf / "config.json").unlink()
    with pytest.raises(UserError, match="holds GGUF files"):
        read_hf_config(hf)


# ------------------------------------------------------------------------------------------------------- FP8
def e4m3(code: int) -> float:
    """The value of a code by the format's definition (arXiv:2209.05433): 4 exponent bits with bias 7, 3 of mantissa."""
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def fp8_folder(hf: Path, block: int) -> dict[str, torch.Tensor]:
    """Quantise the layers' matrices in place; the bfloat16 weights that the values and scales stand for."""
    constants = float32_tensors(read_hf_config(hf))
    tensors = load_file(hf / "model.safetensors")
    tensors = {name: tensor if name in constants else tensor.bfloat16() for name, tensor in tensors.items()}
    stored, meant = dict(tensors), dict(tensors)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if "_proj" not in name:
            continue
        rows, columns = tensor.shape
        # every finite code, in every place of a block sooner or later
        codes = torch.randint(0, 256, tensor.shape, generator=generator, dtype=torch.int64)
        codes[(codes & 127) == 127] = 1
        scales = 2e-3 * torch.rand(-(-rows // block), -(-columns // block), generator=generator) + 1e-5
        stored[name] = codes.to(torch.uint8).view(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
        values = torch.tensor([e4m3(code) for code in range(256)])[codes]
        wide = scales.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
        meant[name] = (values * wide).bfloat16()
    save_file(stored, hf / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((hf / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    (hf / "config.json").write_text(json.dumps(config))
    return meant


def test_every_code_and_scale_is_read_as_an_independent_reference_does(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.int64)
    codes[(codes & 127) == 127] = 0
    grid = codes.repeat(8).view(16, 128).to(torch.uint8)
    scales = torch.tensor([[1.0, 3e-4, 7e4], [2.0**-20, 0.1, 1 / 3], [448.0, 1e-8, 5.0], [1.5, 0.7, 1e3]])
    save_file(
        {"x.weight": grid.view(torch.float8_e4m3fn), "x.weight_scale_inv": scales}, tmp_path / "model.safetensors"
    )
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 48]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    reader = HFReader(tmp_path)
    found = reader.tensor("x.weight")
    for row in range(16):
        for column in range(128):
            exact = e4m3(int(grid[row, column])) * float(scales[row // 4, column // 48])
            assert found[row, column] == torch.tensor(exact, dtype=torch.float32).bfloat16()
    assert reader.names() == ["x.weight"] and reader.dtype("x.weight") == "BF16"
    assert torch.equal(reader.slice("x.weight", 0, 3, 9), found[3:9])
    assert torch.equal(reader.slice("x.weight", 1, 40, 100), found[:, 40:100])


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_fp8_blocks_are_dequantised_on_import(family: str, tmp_path: Path) -> None:
    """The export has the bfloat16 weights that the values stand for, and no quantisation in its config."""
    hf = make_hf_model(tmp_path / "hf", family, **CASES.get(family, [{}])[0])
    constants = float32_tensors(read_hf_config(hf))
    meant = fp8_folder(hf, block=16)
    conversion = hf_to_megatron(hf, tmp_path / "megatron")
    assert conversion.proof is not None and conversion.proof.ok
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == meant.keys()
    assert all(tensor.dtype == meant[name].dtype and torch.equal(tensor, meant[name]) for name, tensor in back.items())
    assert {name for name, tensor in back.items() if tensor.dtype == torch.float32} == constants
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config and "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


def test_other_quantisations_are_refused(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    for quantization in ({"quant_method": "awq"}, {"quant_method": "fp8"}):
        (hf / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        with pytest.raises(UserError, match="only fp8 with weight_block_size is dequantised"):
            read_hf_config(hf)
