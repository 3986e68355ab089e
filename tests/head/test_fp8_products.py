"""The FP8 products: torch._scaled_mm, which a GPU without Transformer Engine uses, with the simulation of a CPU.

A CPU's _scaled_mm takes the same e4m3 operands and scales; the accumulators of a GPU's tensor cores are not covered.
"""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from owpo_megatron.errors import UserError
from owpo_megatron.head import fp8


def operands(rows: int, hidden: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    weight_VH = torch.randn(vocab, hidden, generator=generator) * torch.rand(vocab, 1, generator=generator)
    return torch.randn(rows, hidden, generator=generator).to(dtype), weight_VH.to(dtype)


@pytest.mark.parametrize(("rows", "hidden", "vocab"), [(32, 64, 256), (17, 65, 515), (1, 16, 16), (3, 7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_mm_is_the_simulated_product(rows: int, hidden: int, vocab: int, dtype: torch.dtype) -> None:
    """Also where nothing is a multiple of 16; the float32 sums differ in their order alone."""
    h_TH, weight_VH = operands(rows, hidden, vocab, dtype)
    real, simulated = fp8._ScaledMm(weight_VH)(h_TH), fp8._Simulated(weight_VH)(h_TH)
    assert real.shape == simulated.shape == (rows, vocab) and real.dtype == simulated.dtype == torch.float32
    torch.testing.assert_close(real, simulated, rtol=1e-6, atol=1e-6 * simulated.abs().max().item())
    assert not torch.allclose(real, h_TH.float() @ weight_VH.float().t(), rtol=1e-4, atol=1e-4), "e4m3 has 3 bits"


@pytest.mark.parametrize("kind", [fp8._ScaledMm, fp8._Simulated])
def test_a_given_buffer_gets_the_same_bits(kind: Any) -> None:
    """One buffer for chunks of unequal length, whose rows and columns are rounded up to whole tiles."""
    h_TH, weight_VH = operands(37, 33, 130, torch.bfloat16)
    buffer_CV = torch.full((fp8.whole_tiles(37), fp8.whole_tiles(130)), torch.nan)
    product = kind(weight_VH)
    for rows in (37, 20, 16):
        out = product(h_TH[:rows], buffer_CV)
        assert out.untyped_storage().data_ptr() == buffer_CV.untyped_storage().data_ptr()
        assert torch.equal(out, product(h_TH[:rows]))


def test_the_call_of_an_older_transformer_engine_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules with 2.9's signature stand in for it: its third argument was a workspace."""

    def general_gemm(A: Any, B: Any, workspace: Any, out_dtype: Any = None) -> Any: ...

    parts = {
        "transformer_engine_torch": {},
        "transformer_engine.pytorch.cpp_extensions": {"general_gemm": general_gemm},
        "transformer_engine.pytorch.tensor.float8_tensor": {"Float8CurrentScalingQuantizer": object},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.0")
    with pytest.raises(UserError, match=r"Transformer Engine = 2\.9\.0.*2\.10 or newer"):
        fp8._TransformerEngine(torch.zeros(16, 16))
