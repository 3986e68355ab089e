"""The nouns that cross rooms, and the seams between the rooms.

Shape suffixes used throughout the project:
    P prompts of a step, G siblings of a prompt, N = P * G samples, T packed tokens of a microbatch, L tokens of one
    response, V vocabulary, H hidden size.

Data are frozen dataclasses; seams are protocols of a few methods whose docstring is the contract.
"""

from owpo_megatron.types.rollouts import (
    FinishReason,
    GradingItem,
    Group,
    Judgement,
    Origin,
    Prompt,
    PromptRecord,
    Rollout,
    SampleRequest,
    Sampling,
    Verdict,
    VerdictReason,
)
from owpo_megatron.types.seams import (
    Finished,
    LogprobSource,
    Policy,
    Progress,
    PromptStream,
    Ranks,
    Reference,
    RolloutEngine,
    Sink,
    Stateful,
    StepLog,
    Storable,
    Swappable,
    Verdicts,
    Verifier,
    WeightSync,
)
from owpo_megatron.types.training import (
    Candidate,
    LogpMode,
    ReferenceNeed,
    ReferenceReason,
    ReferenceVersion,
    Sample,
    TokenBatch,
)

__all__ = [
    "Candidate",
    "FinishReason",
    "Finished",
    "GradingItem",
    "Group",
    "Judgement",
    "LogpMode",
    "LogprobSource",
    "Origin",
    "Policy",
    "Progress",
    "Prompt",
    "PromptRecord",
    "PromptStream",
    "Ranks",
    "Reference",
    "ReferenceNeed",
    "ReferenceReason",
    "ReferenceVersion",
    "Rollout",
    "RolloutEngine",
    "Sample",
    "SampleRequest",
    "Sampling",
    "Sink",
    "Stateful",
    "StepLog",
    "Storable",
    "Swappable",
    "TokenBatch",
    "Verdict",
    "VerdictReason",
    "Verdicts",
    "Verifier",
    "WeightSync",
]
