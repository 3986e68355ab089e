"""Kernels that are fused on a GPU, for each kind of model and set of libraries. Not covered: the kernels."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES
from transformers import AutoConfig

from owpo_megatron.config import ParallelConfig
from owpo_megatron.doctor import Scope, devices
from owpo_megatron.doctor.finding import Finding
from owpo_megatron.errors import UserError
from owpo_megatron.families import MLP, HFModel, Rope, Yarn, read_hf_config
from owpo_megatron.mcore import cpu, fusions, spec

ALL = frozenset({"Transformer Engine", "apex", "Triton", "torch.compile"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, HFModel]:
    root: Path = tmp_path_factory.mktemp("models")
    kinds = ("qwen3", "qwen3_moe", "gpt_oss", "glm4", "deepseek_v3", "gemma3_text")
    for name in kinds:
        AutoConfig.for_model(name, **(CASES[name][0] if name in CASES else {})).save_pretrained(root / name)
    return {name: read_hf_config(root / name) for name in kinds}


def on(hf: HFModel, have: frozenset[str] = ALL) -> dict[str, str]:
    return {one.about: one.by for one in fusions.decide(hf, have) if one.by}


@pytest.mark.parametrize(
    ("have", "expected"),
    [
        (set(), {}),
        ({"Triton"}, {}),  # without a C compiler
        ({"Triton", "torch.compile"}, {"SwiGLU": "torch.compile"}),
        ({"apex"}, {"gradient accumulation": "apex"}),
        ({"Transformer Engine"}, {"RoPE": "Transformer Engine", "gradient accumulation": "Transformer Engine"}),
        (
            ALL,
            {
                "RoPE": "Transformer Engine",
                "SwiGLU": "torch.compile",
                "gradient accumulation": "Transformer Engine",
            },
        ),
    ],
)
def test_what_is_installed_decides(models: dict[str, HFModel], have: set[str], expected: dict[str, str]) -> None:
    assert on(models["qwen3"], frozenset(have)) == expected
    for one in fusions.decide(models["qwen3"], frozenset(have)):
        assert bool(one.by) == (not one.why_off) == (not one.installable)


def test_the_model_decides(models: dict[str, HFModel]) -> None:
    """A kernel that leaves out what the model has would give wrong log-probs, without a word."""
    off = {
        name: {one.about: one.why_off for one in fusions.decide(hf, ALL) if not one.by} for name, hf in models.items()
    }
    assert off["qwen3"] == off["qwen3_moe"] == {}
    assert on(models["qwen3_moe"])["experts' permutation"] == "Transformer Engine"
    assert "pairs are neighbours" in off["glm4"]["RoPE"]
    assert "experimental" in off["deepseek_v3"]["RoPE"]
    assert off["gemma3_text"].keys() == {"SwiGLU"}  # GELU
    assert off["gpt_oss"].keys() == {"RoPE", "SwiGLU"}  # YaRN; clamped
    yarn = Rope(1e6, yarn=Yarn(4.0, 32768, 32.0, 1.0, True, None, None))
    assert "RoPE" not in on(dataclasses.replace(models["qwen3"], rope=yarn))
    assert "SwiGLU" not in on(dataclasses.replace(models["qwen3_moe"], biases=True))
    mixed = dataclasses.replace(models["qwen3_moe"].experts, dense=MLP(64, "gelu_tanh"))
    assert "SwiGLU" not in on(dataclasses.replace(models["qwen3_moe"], mlp=mixed))
    assert not any(one.installable for hf in models.values() for one in fusions.decide(hf, ALL))


def test_a_configuration_turns_one_off_but_not_on(models: dict[str, HFModel]) -> None:
    decided = fusions.decide(models["qwen3"], frozenset({"apex"}))
    assert fusions.fields_of(decided, {"gradient_accumulation_fusion": False}) == {
        "apply_rope_fusion": False,
        "bias_activation_fusion": False,
    }
    assert "gradient accumulation (the configuration" in fusions.line(decided, {"gradient_accumulation_fusion": False})
    with pytest.raises(UserError, match="megatron.apply_rope_fusion = True: needs Transformer Engine; remove it"):
        fusions.fields_of(decided, {"apply_rope_fusion": True})


def test_what_can_be_imported_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformer_engine", "transformer_engine.pytorch", "fused_weight_gradient_mlp_cuda", "triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setenv("CC", "cc")
    assert fusions.available() == ALL
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert "torch.compile" not in fusions.available()
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)  # importing it raises
    assert fusions.available() == {"apex", "Triton"}


def test_fields_on_a_gpu_and_on_a_cpu(models: dict[str, HFModel], monkeypatch: pytest.MonkeyPatch) -> None:
    def config(raw: dict[str, Any] | None = None) -> Any:
        return spec.transformer_config(models["qwen3"], ParallelConfig(), torch.bfloat16, raw or {})

    assert not config().bias_activation_fusion and not config().gradient_accumulation_fusion
    with pytest.raises(UserError, match="megatron.bias_activation_fusion = True: on a GPU only; remove it"):
        config({"bias_activation_fusion": True})
    monkeypatch.setattr(cpu, "on_cpu", lambda: False)
    monkeypatch.setattr(spec, "available", lambda: ALL - {"Transformer Engine"})
    assert config().bias_activation_fusion and config().gradient_accumulation_fusion
    assert not config().apply_rope_fusion
    assert not config({"bias_activation_fusion": False}).bias_activation_fusion


def test_the_doctor_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"version": "2.13.0", "cuda_available": True, "cuda": "13.0", "nccl": "2.29", "fused_by": sorted(ALL)}
    monkeypatch.setattr(devices, "torch_facts", lambda: found | {"transformer_engine": "no", "apex": "works"})
    monkeypatch.setattr(devices, "gpu_names", lambda: ["NVIDIA H200"])
    (row,) = [one for one in devices.devices(Scope()) if one.what == "fused kernels"]
    expected = "fused: RoPE (Transformer Engine), SwiGLU (torch.compile), gradient accumulation (Transformer Engine)"
    assert (row.status, row.detail) == ("ok", expected)
    found["fused_by"] = ["apex"]
    (row,) = [one for one in devices.devices(Scope()) if one.what == "fused kernels"]
    assert row.status == "warn" and "needs Triton and a C compiler" in row.detail and row.remedy


def test_apex_is_not_missed_beside_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"version": "2.13.0", "cuda_available": True, "cuda": "13.0", "nccl": "2.29", "fused_by": sorted(ALL)}
    monkeypatch.setattr(devices, "torch_facts", lambda: found)
    monkeypatch.setattr(devices, "gpu_names", lambda: ["NVIDIA H200"])
    monkeypatch.setattr(devices, "_in_range", lambda name: Finding(name, "ok", "2.11.0"))
    for engine, status in (("works", "ok"), (None, "warn")):
        found["transformer_engine"] = engine
        (row,) = [one for one in devices.devices(Scope()) if one.what == "apex"]
        assert row.status == status and row.detail.startswith("absent: ")
