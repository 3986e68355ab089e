"""The LM head: log-probs, entropies, losses and their gradients, without ever holding the logits of all tokens."""

from owpo_megatron.head.fp8 import Fp8Weight
from owpo_megatron.head.fp8_check import Fp8Error, fp8_error, settled_mode
from owpo_megatron.head.logprob import logprob
from owpo_megatron.head.logprobs import (
    ComparableLogProbs,
    ExactLogProbs,
    LogProbs,
    RawLogProbs,
    RefinedLogProbs,
    check_comparable,
)
from owpo_megatron.head.objective import GradientObjective, logp_gradient
from owpo_megatron.head.policy_head import HeadRows, PolicyHeadOut, policy_head

__all__ = [
    "ComparableLogProbs",
    "ExactLogProbs",
    "Fp8Error",
    "Fp8Weight",
    "GradientObjective",
    "HeadRows",
    "LogProbs",
    "PolicyHeadOut",
    "RawLogProbs",
    "RefinedLogProbs",
    "check_comparable",
    "fp8_error",
    "logp_gradient",
    "logprob",
    "policy_head",
    "settled_mode",
]
