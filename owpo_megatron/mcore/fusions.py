"""Fused kernels that megatron-core leaves off: which of them a run uses, and why it goes without the others.

On CUDA each is on wherever what it needs can be imported and computes what the model asks for. `megatron:
{apply_rope_fusion: false}` turns one off. Never run: no GPU was at hand.

Not here, since nothing would change: `masked_softmax_fusion` and `persist_layer_norm` (modules that no layer has),
`bias_dropout_fusion` (without dropout and bias one addition is left), `cross_entropy_loss_fusion` (the head computes no
such loss), `moe_router_fusion` (it would pass over the trainer's own choice of groups).
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel, LatentAttention

TRANSFORMER_ENGINE, APEX = "Transformer Engine", "apex"
_MODULES = {  # which an import decides
    TRANSFORMER_ENGINE: "transformer_engine.pytorch",
    APEX: "fused_weight_gradient_mlp_cuda",  # apex's, built with --cuda_ext
    "Triton": "triton",
}
COMPILER = "torch.compile"
_DETAILS = {COMPILER: "Triton and a C compiler", APEX: "apex built with --cuda_ext"}


@dataclass(frozen=True)
class Fusion:
    """One field of TransformerConfig.

    Example:
        Fusion("apply_rope_fusion", "RoPE", "Transformer Engine")
        Fusion("apply_rope_fusion", "RoPE", None, "its kernel leaves out YaRN's factor")
    """

    field: str
    about: str
    by: str | None  # what provides it; None: it is off
    why_off: str = ""
    installable: bool = False  # it is off for want of software, not because of the model


def available() -> frozenset[str]:
    """Return what fused kernels can come from in this environment, by importing it."""
    found = {name for name, module in _MODULES.items() if _imports(module)}
    # Triton compiles what starts its kernels
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return frozenset(found | ({COMPILER} if "Triton" in found and compiler else set()))


def decide(hf: HFModel | None, have: frozenset[str]) -> tuple[Fusion, ...]:
    """The fusions of a model on CUDA (None: of a plain one), with what `available` returns there."""
    fusions = [
        _one("apply_rope_fusion", "RoPE", (TRANSFORMER_ENGINE,), have, _unfit_rope(hf) if hf else ""),
        _one("bias_activation_fusion", "SwiGLU", (COMPILER,), have, _unfit_activation(hf) if hf else ""),
        # the GEMM adds to main_grad in float32, instead of rounding to bfloat16 first
        _one("gradient_accumulation_fusion", "gradient accumulation", (TRANSFORMER_ENGINE, APEX), have),
    ]
    if hf and hf.experts:
        fusions.append(_one("moe_permute_fusion", "experts' permutation", (TRANSFORMER_ENGINE,), have))
    return tuple(fusions)


def fields_of(fusions: tuple[Fusion, ...], raw: Mapping[str, Any]) -> dict[str, bool]:
    """Fields of TransformerConfig that the section `megatron` of a configuration does not set.

    Raises:
        UserError: it turns on one that cannot be.
    """
    for one in fusions:
        if raw.get(one.field) and not one.by:
            raise UserError(f"megatron.{one.field}", raw[one.field], f"{one.why_off}; remove it")
    return {one.field: one.by is not None for one in fusions if one.field not in raw}


def line(fusions: tuple[Fusion, ...], raw: Mapping[str, Any]) -> str:
    """Return which are on, by what, and which are off, for the log.

    Example:
        >>> swiglu = Fusion("bias_activation_fusion", "SwiGLU", "torch.compile")
        >>> line((swiglu, Fusion("apply_rope_fusion", "RoPE", None, "needs Transformer Engine")), {})
        'fused: SwiGLU (torch.compile); not fused: RoPE (needs Transformer Engine)'
    """
    on, off = [], []
    for one in fusions:
        if one.by and raw.get(one.field, True):
            on.append(f"{one.about} ({one.by})")
        else:
            off.append(f"{one.about} ({one.why_off or 'the configuration turns it off'})")
    parts = [f"{title}: {', '.join(names)}" for title, names in (("fused", on), ("not fused", off)) if names]
    return "; ".join(parts)


def _one(field: str, about: str, providers: tuple[str, ...], have: frozenset[str], unfit: str = "") -> Fusion:
    """The first provider that is there.

    Args:
        unfit: why no provider's kernel computes what the model asks for.
    """
    if unfit:
        return Fusion(field, about, None, unfit)
    by = next((name for name in providers if name in have), None)
    missing = "" if by else f"needs {' or '.join(_DETAILS.get(name, name) for name in providers)}"
    return Fusion(field, about, by, missing, installable=not by)


def _unfit_rope(hf: HFModel) -> str:
    """megatron-core gives Transformer Engine's kernel for packed sequences neither `interleaved` nor YaRN's factor."""
    if isinstance(hf.attention, LatentAttention):
        return "megatron-core's kernel for latent attention is experimental"
    if hf.rope.interleaved:
        return "megatron-core's call of the kernel leaves out that pairs are neighbours"
    return "the kernel leaves out YaRN's factor" if hf.rope.yarn else ""


def _unfit_activation(hf: HFModel) -> str:
    mlps = [one for one in (hf.mlp, hf.experts and hf.experts.dense) if one]
    if any(one.activation != "silu" for one in mlps):
        return "this activation has no fused form"
    return "experts with biases have no fused form" if hf.experts and hf.biases else ""


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception:  # a build for another torch raises anything; `owpo doctor` reports it
        return False
    return True
