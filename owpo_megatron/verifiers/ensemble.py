"""The rule `ensemble:FILE.yaml`: several reward models judge a response, and their scores are combined cautiously.

A policy that is trained on one reward model learns its errors; where several disagree, the combined score is low.
Source: arXiv:2310.02743 (worst case, and mean minus a multiple of the variance); `mean_minus_std` is the form in the
scores' own units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from owpo_megatron.config.file import Section, first_mistake, read_mapping
from owpo_megatron.config.reward import OWN_PARTS
from owpo_megatron.config.verifier import OwnRule
from owpo_megatron.errors import UserError
from owpo_megatron.types import GradingItem, Judgement, VerdictReason
from owpo_megatron.verifiers.grading import FAILURES

Combine = Literal["min", "mean_minus_std", "mean_minus_variance"]
Member = Callable[[GradingItem], VerdictReason | Judgement]


class EnsembleConfig(Section):
    """Content of an ensemble's file."""

    rules: dict[str, OwnRule]
    """The reward models: a name, and `judge:FILE.yaml`, `python:module:function` or a URL each. Each score is a part of
    the reward with this name."""
    combine: Combine = "min"
    """How their scores become one: the worst; or their mean less `k` standard deviations, or `k` variances, of them."""
    k: float | None = Field(None, gt=0)
    """Weight of the disagreement; not for `min`."""
    correct_from: float = 1.0
    """Score from which a response counts as correct."""

    @model_validator(mode="after")
    def _makes_sense(self) -> EnsembleConfig:
        rules = list(self.rules.values())
        if len(rules) < 2:
            raise UserError("rules", ", ".join(self.rules) or "(none)", "give at least two reward models")
        for name, rule in self.rules.items():
            if rules.count(rule) > 1:
                raise UserError(f"rules.{name}", rule, "is named twice, and always agrees with itself; remove one")
            if name in OWN_PARTS:
                raise UserError(f"rules.{name}", rule, f"rename it: every reward has the parts {', '.join(OWN_PARTS)}")
            if rule.startswith("ensemble:"):
                raise UserError(f"rules.{name}", rule, "an ensemble is no part of another; name its rules here")
        if self.combine == "min" and self.k is not None:
            raise UserError("k", self.k, "the minimum has no weight; leave it out, or use mean_minus_std")
        if self.combine != "min" and self.k is None:
            raise UserError("k", "(missing)", f"{self.combine} needs it: how much disagreement costs")
        return self


@dataclass(frozen=True)
class EnsembleRule:
    """The score is that of all members together, the parts are theirs. They are asked one after another.

    A response that one member fails to judge has no verdict: it is masked and counted, not scored by the others.
    """

    config: EnsembleConfig
    members: tuple[tuple[str, Member], ...]

    @classmethod
    def read(cls, path: str, proxy: bool = False) -> EnsembleRule:
        """Read an ensemble's file, and those of its judges.

        Raises:
            UserError: there is no such file, a field is wrong, or a member does not exist.
        """
        from owpo_megatron.verifiers.rules import find_rule

        if not Path(path).is_file():
            raise UserError("verifier.rule", f"ensemble:{path}", "no such file; name a YAML file")
        try:
            config = EnsembleConfig.model_validate(read_mapping(Path(path)))
        except UserError as error:
            raise UserError("verifier.rule", f"ensemble:{path}", error.remedy) from error
        except ValidationError as error:
            found = first_mistake(error, EnsembleConfig)
            raise UserError(f"{path}: {found.field}", found.value, found.remedy) from error
        members = tuple((name, find_rule(rule, proxy)) for name, rule in config.rules.items())
        return cls(config, members)

    def warm(self) -> None:
        for _, member in self.members:
            if warm := getattr(member, "warm", None):
                warm()

    def __call__(self, item: GradingItem) -> VerdictReason | Judgement:
        scores: dict[str, float] = {}
        for name, member in self.members:
            said = member(item)
            reason, score = (said.reason, said.score) if isinstance(said, Judgement) else (said, None)
            if reason in FAILURES:
                return reason
            scores[name] = float(reason == "ok") if score is None else score
        score = combined(list(scores.values()), self.config.combine, self.config.k or 0.0)
        return Judgement("ok" if score >= self.config.correct_from else "wrong", score, scores)


def combined(scores: Sequence[float], combine: Combine, k: float) -> float:
    """One score of several. Standard deviation and variance are those of the scores themselves (divided by n).

    Example:
        >>> [combined([1.0, 0.5, 0.0], how, k=1.0) for how in ("min", "mean_minus_variance")]
        [0.0, 0.33333333333333337]
    """
    if combine == "min":
        return min(scores)
    mean = sum(scores) / len(scores)
    variance = sum((score - mean) ** 2 for score in scores) / len(scores)
    return mean - k * (math.sqrt(variance) if combine == "mean_minus_std" else variance)
