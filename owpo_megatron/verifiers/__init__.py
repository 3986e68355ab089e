"""Extraction and equivalence of answers, graded in process or in a pool of killable workers."""

from owpo_megatron.verifiers.build import make_verifier
from owpo_megatron.verifiers.direct import DirectVerifier
from owpo_megatron.verifiers.pool import VerifierPool

__all__ = ["DirectVerifier", "VerifierPool", "make_verifier"]
