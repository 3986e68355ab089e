"""The LM head: log-probs, entropies, losses and their gradients, without ever holding the logits of all tokens."""

from owpo_megatron.head.fp8 import Fp8Weight
from owpo_megatron.head.fp8_check import HeadError, head_error, settled_mode
from owpo_megatron.head.head import Head, HeadLoss, HeadRows
from owpo_megatron.head.logprobs import (
    ComparableLogProbs,
    ExactLogProbs,
    LogProbs,
    RawLogProbs,
    RefinedLogProbs,
)
from owpo_megatron.head.shard import VocabShard
from owpo_megatron.head.whole import TeacherRows

__all__ = [
    "ComparableLogProbs",
    "ExactLogProbs",
    "Fp8Weight",
    "Head",
    "HeadError",
    "HeadLoss",
    "HeadRows",
    "LogProbs",
    "RawLogProbs",
    "RefinedLogProbs",
    "TeacherRows",
    "VocabShard",
    "head_error",
    "settled_mode",
]
