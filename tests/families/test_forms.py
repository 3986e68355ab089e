"""Forms of weights besides safetensors: .bin files, GGUF, FP8 with a scale per block, MXFP4.

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

from owpo_megatron.conversion import export
from owpo_megatron.conversion.export import hf_to_megatron, megatron_to_hf
from owpo_megatron.errors import UserError
from owpo_megatron.families import HFReader, float32_tensors, read_hf_config
from owpo_megatron.families.forms import Mxfp4View, TensorView, dequantised


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


# ----------------------------------------------------------------------------------------------------- MXFP4
def e2m1(code: int) -> float:
    """The value of a code by the format's definition (OCP Microscaling Formats 1.0): 2 exponent bits with bias 1."""
    sign, exponent, mantissa = -1.0 if code >> 3 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def test_every_mxfp4_code_and_scale_is_read_as_an_independent_reference_does() -> None:
    """All 16 codes in both halves of a byte under all 256 scales; 255 is the NaN of E8M0."""
    scales = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = torch.arange(32) % 16
    blocks = (codes[0::2] | codes[1::2].flip(0) << 4).to(torch.uint8).expand(256, 1, 16)
    found = dequantised(blocks, scales)
    assert found.shape == (256, 32) and found.dtype == torch.bfloat16
    for scale in range(256):
        for place in range(32):
            byte = int(blocks[scale, 0, place // 2])
            code = byte & 15 if place % 2 == 0 else byte >> 4
            if scale == 255:
                assert found[scale, place].isnan()
                continue
            exact = torch.tensor(e2m1(code) * 2.0 ** (scale - 127), dtype=torch.float64)
            assert found[scale, place] == exact.bfloat16() and found[scale, place].signbit() == exact.signbit()


def test_mxfp4_as_transformers_reads_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (3, 8, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 8, 2), generator=generator, dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales)  # [3, 64, 8]
    for expert in range(3):
        view = Mxfp4View(TensorView(blocks), TensorView(scales), expert)
        assert view.get_shape() == [64, 8]
        assert torch.equal(view[:], theirs[expert])
        assert torch.equal(view[5:40], theirs[expert, 5:40]) and torch.equal(view[:, 2:5], theirs[expert, :, 2:5])


def mxfp4_folder(hf: Path) -> dict[str, torch.Tensor]:
    """Replace the experts' matrices by MXFP4 ones; the bfloat16 tensors that these stand for."""
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(hf / "model.safetensors").items()}
    stored, meant = dict(tensors), dict(tensors)
    generator = torch.Generator().manual_seed(6)
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, inner, outer = tensor.shape
        codes = torch.randint(0, 16, (experts, outer, inner), generator=generator)
        scales = torch.randint(120, 124, (experts, outer, inner // 32), generator=generator)
        packed = (codes[..., 0::2] | codes[..., 1::2] << 4).view(experts, outer, inner // 32, 16)
        stored[name + "_blocks"], stored[name + "_scales"] = packed.to(torch.uint8), scales.to(torch.uint8)
        del stored[name]
        values = torch.tensor([e2m1(code) for code in range(16)])[codes]
        meant[name] = (values * 2.0 ** (scales - 127).repeat_interleave(32, -1)).bfloat16().transpose(1, 2).contiguous()
    save_file(stored, hf / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((hf / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (hf / "config.json").write_text(json.dumps(config))
    return meant


def test_mxfp4_is_dequantised_on_import(tmp_path: Path) -> None:
    """The export has, bit for bit, the bfloat16 weights that the codes and scales stand for."""
    hf = make_hf_model(tmp_path / "hf", "gpt_oss", **(CASES["gpt_oss"][0] | {"hidden_size": 64}))
    meant = mxfp4_folder(hf)
    conversion = hf_to_megatron(hf, tmp_path / "megatron")
    assert conversion.proof is not None and conversion.proof.ok and conversion.dtype == "bfloat16"
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == meant.keys()
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, meant[name]) for name, tensor in back.items())
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_other_quantisations_are_refused(hf: Path) -> None:
    config = json.loads((hf / "config.json").read_text())
    for quantization in ({"quant_method": "awq"}, {"quant_method": "fp8"}):
        (hf / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        with pytest.raises(UserError, match="only mxfp4, and fp8 with weight_block_size, are dequantised"):
            read_hf_config(hf)


# ------------------------------------------------------------------------------------------------ what is written
def test_an_export_in_shards_has_everything_that_the_source_folder_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of all experts together; a sharded source; an index that transformers reads; the other files."""
    from transformers import AutoModelForCausalLM

    hf = make_hf_model(tmp_path / "hf", "gpt_oss", **CASES["gpt_oss"][0])
    tensors = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    names = list(tensors)
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, hf / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[number::3], file)
    (hf / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    beside = {"LICENSE": "a licence", "README.md": "a card", "generation_config.json": "{}", "chat_template.jinja": "x"}
    for name, text in beside.items():
        (hf / name).write_text(text)
    hf_to_megatron(hf, tmp_path / "megatron")
    monkeypatch.setattr(export, "_SHARD_BYTES", 60_000)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = tmp_path / "back"
    assert {name: (back / name).read_text() for name in beside} == beside
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = sorted(back.glob("*.safetensors"))
    assert len(files) > 3 and {file.name for file in files} == set(index["weight_map"].values())
    found = {}
    for file in files:
        part = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in part)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 60_000
        found |= part
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    weight = AutoModelForCausalLM.from_pretrained(back).model.layers[1].mlp.experts.gate_up_proj
    assert torch.equal(weight, tensors["model.layers.1.mlp.experts.gate_up_proj"])
