"""Rotary embeddings: what an HF config asks for, of what megatron-core can compute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owpo_megatron.errors import UserError

# megatron-core's llama3 scaling has these built in; only the factor can be chosen
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Yarn:
    """YaRN scaling (arXiv:2309.00071), as Qwen2.5 and Qwen3 switch it on for long contexts."""

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool  # round the bounds of the ramp between scaled and plain frequencies
    mscale: float | None  # both None: the concentration factor comes from `factor` alone
    mscale_all_dim: float | None


@dataclass(frozen=True)
class Rope:
    """Base of the frequencies, at most one kind of scaling, and which dimensions of a head are rotated."""

    theta: float
    llama3_factor: float | None = None
    yarn: Yarn | None = None
    linear_factor: float | None = None  # positions are divided by it
    fraction: float = 1.0  # of a head's dimensions, the first ones
    interleaved: bool = False  # pairs are neighbours, not halves

    def latent_fields(self) -> dict[str, Any]:
        """Fields of megatron-core's MLATransformerConfig, whose attention has a rotary embedding of its own."""
        if self.yarn is None:
            return dict(rope_type="rope", rotary_base=self.theta)
        yarn = self.yarn
        return dict(
            rope_type="yarn",
            rotary_base=self.theta,
            rotary_scaling_factor=yarn.factor,
            original_max_position_embeddings=yarn.original_positions,
            beta_fast=yarn.beta_fast,
            beta_slow=yarn.beta_slow,
            mscale=yarn.mscale,
            mscale_all_dim=yarn.mscale_all_dim,
        )


def read_rope(path: Path, config: Any, partial: bool = False, interleaved: bool = False) -> Rope:
    """The one rotary embedding of a transformers config; arguments and errors as of `rope_of`."""
    return rope_of(path, config.rope_parameters, partial, interleaved)


def rope_of(path: Path, parameters: Mapping[str, Any], partial: bool = False, interleaved: bool = False) -> Rope:
    """The rotary embedding of a transformers config's rope parameters.

    Args:
        path: folder of the model, for errors.
        partial: the family's heads may be rotated in part (`partial_rotary_factor`).
        interleaved: the family pairs neighbouring dimensions.

    Raises:
        UserError: a kind or a parameter that megatron-core does not have.
    """
    rope = dict(parameters)
    kind = rope.get("rope_type", "default")
    where = f"{path / 'config.json'} rope_parameters"
    theta = _positive(where, rope, "rope_theta")
    fraction = _positive(where, rope, "partial_rotary_factor") if rope.get("partial_rotary_factor") else 1.0
    if fraction != 1.0 and not (partial and kind == "default"):
        remedy = "partial rotary embeddings are not supported in this family, nor with scaling"
        raise UserError(f"{where}.partial_rotary_factor", fraction, remedy)
    if kind == "default":
        return Rope(theta, fraction=fraction, interleaved=interleaved)
    if interleaved:
        raise UserError(f"{where}.rope_type", kind, "rope scaling is not supported in this family; use default")
    if kind == "llama3":
        for field, expected in _LLAMA3.items():
            if rope[field] != expected:
                raise UserError(f"{where}.{field}", rope[field], f"megatron-core has {expected:g} built in")
        return Rope(theta, llama3_factor=_positive(where, rope, "factor"))
    if kind == "yarn":
        return Rope(theta, yarn=_yarn(where, rope))
    if kind == "linear":
        return Rope(theta, linear_factor=_positive(where, rope, "factor"))
    raise UserError(f"{where}.rope_type", kind, "not supported; use default, linear, llama3 or yarn")


def _yarn(where: str, rope: dict[str, Any]) -> Yarn:
    factor = _positive(where, rope, "factor")
    given, derived = rope.get("attention_factor"), 0.1 * math.log(factor) + 1
    if given is not None and not math.isclose(given, derived, rel_tol=1e-9):
        remedy = f"megatron-core derives {derived:g} from factor; leave it out"
        raise UserError(f"{where}.attention_factor", given, remedy)
    both = rope.get("mscale") and rope.get("mscale_all_dim")  # as transformers: one alone counts for nothing
    return Yarn(
        factor=factor,
        original_positions=int(rope["original_max_position_embeddings"]),
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        truncate=bool(rope.get("truncate", True)),
        mscale=rope["mscale"] if both else None,
        mscale_all_dim=rope["mscale_all_dim"] if both else None,
    )


def _positive(where: str, rope: Mapping[str, Any], field: str) -> float:
    value: Any = rope.get(field)
    if type(value) not in (int, float) or not value > 0:
        raise UserError(f"{where}.{field}", value, "give a number above 0")
    return float(value)
