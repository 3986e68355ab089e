"""Results of log-prob passes, in types that carry their exactness, so that rounding never decides a ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from owpo_megatron.types import LogpMode, ReferenceNeed, TokenBatch

COMPARABLE: frozenset[LogpMode] = frozenset({"exact", "fp8_refined"})
"""Modes whose log-probs may be used in a ratio."""
LEARNABLE: frozenset[LogpMode] = COMPARABLE | {"engine"}
"""Modes of what a policy may be drawn towards: an engine's error is small next to the distance to another model."""


@dataclass(frozen=True)
class LogProbs:
    """Log-probs of the targets, entropies and log-sum-exps; rows that were left out are zero.

    Example:
        >>> ExactLogProbs(torch.tensor([-1.0]), torch.tensor([0.5]), torch.tensor([9.0])).mode
        'exact'
    """

    logp_T: torch.Tensor  # fp32 (fp64 for fp64 inputs)
    entropy_T: torch.Tensor
    lse_T: torch.Tensor  # of logits / temperature
    statistic_T: torch.Tensor | None = None  # of the vocabulary, where a method asked for one
    mode: ClassVar[LogpMode]


@dataclass(frozen=True)
class ComparableLogProbs(LogProbs):
    """Log-probs whose error is far below the log-ratios that the methods weigh."""

    def log_ratio(self, other: ComparableLogProbs) -> torch.Tensor:
        """log (p / p_other), [T].

        Raises:
            TypeError: `other` is raw FP8: its error (0.01 to 0.03 mean) is larger than most log-ratios.
        """
        if not isinstance(other, ComparableLogProbs):
            raise TypeError(f"no ratio of {self.mode} and {other.mode} log-probs: use fp8_refined instead of fp8_raw")
        return self.logp_T - other.logp_T


@dataclass(frozen=True)
class ExactLogProbs(ComparableLogProbs):
    """Products of the inputs' dtype summed in float32 (float64), logits never rounded below that."""

    mode: ClassVar[LogpMode] = "exact"


@dataclass(frozen=True)
class RefinedLogProbs(ComparableLogProbs):
    """FP8 over the whole vocabulary, then target and best candidates again exactly."""

    mode: ClassVar[LogpMode] = "fp8_refined"


@dataclass(frozen=True)
class RawLogProbs(LogProbs):
    """FP8 alone. For monitoring: it has no `log_ratio`."""

    mode: ClassVar[LogpMode] = "fp8_raw"


def check_batch(batch: TokenBatch, need: ReferenceNeed, mode: LogpMode) -> None:
    """Refuse a batch whose log-probs may not meet those of a pass in this mode: one mode per ratio.

    A teacher's may be of any mode but raw FP8: no ratio is formed with them.

    Raises:
        TypeError: old, prepared or reference log-probs are of another mode, or the mode itself is raw FP8.
    """
    if mode not in COMPARABLE:
        raise TypeError(f"no ratio may be formed of {mode} log-probs: use exact or fp8_refined")
    given: dict[str, LogpMode | None] = {}
    if batch.old_logp_T is not None:
        given["old"] = batch.old_mode
    if batch.given is not None:
        given["prepared"] = batch.now_mode
    if need != "teacher":
        given["reference"] = batch.ref_mode
    elif batch.ref_mode is not None and batch.ref_mode not in LEARNABLE:
        raise TypeError(f"teacher log-probs are {batch.ref_mode}: nothing can be learnt from them")
    for name, its_mode in given.items():
        if its_mode is not None and its_mode != mode:
            raise TypeError(f"{name} log-probs are {its_mode}, the policy's {mode}: no ratio is formed of two modes")
