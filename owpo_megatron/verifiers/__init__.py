"""Extraction and equivalence of answers, graded in process or in a pool of killable workers."""

from owpo_megatron.verifiers.build import DirectVerifier, make_audited, make_verifier
from owpo_megatron.verifiers.grading import refuse_failed_grading
from owpo_megatron.verifiers.pool import VerifierPool

__all__ = ["DirectVerifier", "VerifierPool", "make_audited", "make_verifier", "refuse_failed_grading"]
