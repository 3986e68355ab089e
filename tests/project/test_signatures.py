"""Calls of Transformer Engine, SGLang and megatron-core against the signatures of the pinned versions.

The signatures are data, read from the pinned sources by tools/signatures.py; what cannot be installed on a CPU is
checked all the same. Not covered: types, values, and what the functions do.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core
import pytest

from owpo_megatron.engine.client import EngineClient
from owpo_megatron.engine.tensor_body import TensorBody
from owpo_megatron.sync.ipc import FlattenedTensorMetadata
from owpo_megatron.types import Prompt, SampleRequest, Sampling

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data" / "signatures"
SITE_PACKAGES = Path(megatron.core.__file__).parents[2]
spec = importlib.util.spec_from_file_location("signatures", ROOT / "tools" / "signatures.py")
assert spec and spec.loader
tool = importlib.util.module_from_spec(spec)
sys.modules["signatures"] = tool  # where its dataclass looks for its module
spec.loader.exec_module(tool)


@functools.cache
def our_calls(package: str) -> list[Any]:
    return [call for file in tool.our_files() for call in tool.calls(file, (package,))]


def recorded(distribution: str) -> dict[str, Any]:
    (file,) = DATA.glob(f"{distribution}-*.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def fault(call: Any, signatures: dict[str, str]) -> str | None:
    """Why a call does not fit; None: it does."""
    if call.target not in signatures:
        return f"{call.where}: {call.target} does not exist"
    signature = inspect.signature(eval(f"lambda {signatures[call.target]}: None"))
    bind: Callable[..., object] = signature.bind_partial if call.open else signature.bind
    try:
        bind(*[None] * call.positional, **dict.fromkeys(call.keywords))
    except TypeError as error:
        return f"{call.where}: {call.target}({signatures[call.target]}): {error}"
    return None


@pytest.mark.parametrize("distribution", sorted(tool.PACKAGES))
def test_our_calls_bind(distribution: str) -> None:
    signatures = recorded(distribution)["signatures"]
    calls = our_calls(tool.PACKAGES[distribution])
    assert len(calls) >= {"transformer-engine": 2, "sglang": 4, "megatron-core": 40}[distribution]
    assert not [text for call in calls if (text := fault(call, signatures))]


def test_megatrons_calls_of_transformer_engine_bind() -> None:
    """Its branches for other versions call what this one does not have; the layers that we use must all be there."""
    signatures = recorded("transformer-engine")["signatures"]
    calls = tool.megatrons_calls(SITE_PACKAGES)
    known = [call for call in calls if call.target in signatures]
    layers = {f"transformer_engine:pytorch.{name}" for name in ("Linear", "LayerNormLinear", "DotProductAttention")}
    fused = {f"transformer_engine.pytorch.permutation:moe_{name}" for name in ("permute_with_probs", "unpermute")}
    fused |= {"transformer_engine.pytorch.attention.rope:apply_rotary_pos_emb"}  # mcore/fusions.py
    assert layers | fused | {"transformer_engine:pytorch.GroupedLinear"} <= {call.target for call in known}
    broken = {call.target: text for call in known if (text := fault(call, signatures))}
    # why `megatron: {fp8_recipe: delayed}` is refused (mcore/fp8_training.py)
    assert "override_linear_precision" in broken.pop("transformer_engine:common.recipe.DelayedScaling")
    # not reached: its module imports get_workspace, which this version does not have, and goes without
    assert "workspace" in broken.pop("transformer_engine.pytorch.cpp_extensions:general_gemm")
    assert not broken


def test_a_changed_signature_is_noticed() -> None:
    """Transformer Engine 2.9 wants a workspace as third argument of general_gemm."""
    file = ROOT / "owpo_megatron" / "head" / "fp8.py"
    (gemm,) = [call for call in tool.calls(file, ("transformer_engine",)) if call.target.endswith(":general_gemm")]
    signatures = recorded("transformer-engine")["signatures"]
    assert fault(gemm, signatures) is None
    older = {gemm.target: signatures[gemm.target].replace("A, B,", "A, B, workspace,")}
    assert "missing a required argument: 'workspace'" in str(fault(gemm, older))


def test_the_recorded_versions_are_the_pinned_ones() -> None:
    engine = (ROOT / "requirements" / "engine-gpu.txt").read_text()
    trainer = (ROOT / "requirements" / "trainer-cpu.txt").read_text()
    kernels = (ROOT / "requirements" / "trainer-kernels.txt").read_text()
    assert f"\nsglang=={recorded('sglang')['version']}\n" in engine
    assert f"\nmegatron-core=={recorded('megatron-core')['version']}\n" in trainer
    assert set(re.findall(r"^transformer_engine\w*==(.+)$", kernels, re.MULTILINE)) == {
        recorded("transformer-engine")["version"]
    }


def test_the_recorded_signatures_of_megatron_are_the_installed_ones() -> None:
    sources = tool.Sources(SITE_PACKAGES)
    for target, text in recorded("megatron-core")["signatures"].items():
        assert sources.signature(target) == text, target


def test_what_is_pickled_by_name_has_the_fields_of_that_class() -> None:
    (fields,) = recorded("sglang")["pickled"].values()
    assert fields == [field.name for field in dataclasses.fields(FlattenedTensorMetadata)]


class Recording(EngineClient):
    """Keeps what it would send."""

    def __init__(self) -> None:
        super().__init__("http://nowhere")
        self.sent: list[tuple[str, dict[str, Any]]] = []

    def _request(self, method: str, path: str, body: Any, timeout: float, mirror: str | None = None) -> Any:
        self.sent.append((path, json.loads(b"".join(body)) if isinstance(body, TensorBody) else body or {}))
        return {"ranks": [], "weight_version": "1", "tp_size": 1, "workers": []}

    def _submit(self, path: str, body: Any, timeout: float, read: Any) -> Any:
        return read(self._request("POST", path, body, timeout))


def test_requests_have_the_fields_that_sglang_reads() -> None:
    """A field that it does not know would be ignored, a missing one refused."""
    client = Recording()
    for control in (client.pause, client.resume, client.flush, client.freeze_gc, client.begin_update):
        control()
    client.end_update()
    client.checksums()
    client.set_version(3)
    client.update_from_tensor([b"one", b"two"])
    client.update_from_bucket([b"one"])
    client.update_from_disk("/weights")
    client.update_from_distributed(["a"], ["bfloat16"], [[2, 3]], "group")
    client.join_group("127.0.0.1", 1, 1, 2, "group", "nccl")
    client.leave_group("group")
    request = SampleRequest(Prompt("p", (1, 2), "", ""), 7)
    with pytest.raises(Exception, match="answered"):
        client.generate([request], Sampling(max_tokens=4, stop=("x",)))
    endpoints = recorded("sglang")["endpoints"]
    assert len(client.sent) == 15
    for path, body in client.sent:
        fields = endpoints[path]
        assert body.keys() <= fields.keys(), path
        assert {name for name, needed in fields.items() if needed} <= body.keys(), path
