"""Extraction and equivalence of answers, graded in process or in a pool of killable workers.

Names are imported when they are first used: the guard of a worker needs the rules alone (verifiers/guard.py).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from owpo_megatron.verifiers.build import DirectVerifier, make_audited, make_verifier
    from owpo_megatron.verifiers.grading import refuse_failed_grading
    from owpo_megatron.verifiers.known import KnownVerdicts
    from owpo_megatron.verifiers.pool import VerifierPool

_HOMES = {
    "DirectVerifier": "build",
    "KnownVerdicts": "known",
    "VerifierPool": "pool",
    "make_audited": "build",
    "make_verifier": "build",
    "refuse_failed_grading": "grading",
}

__all__ = ["DirectVerifier", "KnownVerdicts", "VerifierPool", "make_audited", "make_verifier", "refuse_failed_grading"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
