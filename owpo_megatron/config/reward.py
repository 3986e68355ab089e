"""The section `reward:`: what the verifier's verdicts and a rule's named parts are worth."""

from __future__ import annotations

from pydantic import Field, model_validator

from owpo_megatron.config.file import Section
from owpo_megatron.errors import UserError

OWN_PARTS = ("verdict", "length", "truncated")
"""Parts that every reward has; a rule may not name its own so."""


class RewardConfig(Section):
    """Shape the reward that advantages are made of. Dynamic sampling and `reward_mean` keep to the verifier's."""

    weights: dict[str, float] = {}
    """Factor of each part of the reward, by name: `verdict` (the verifier's), `length` (response tokens over
    rollout.max_response_tokens), `truncated` (1 or 0), and the parts that the rule returns. Empty: the verdict
    alone."""
    gate: float | None = None
    """Count parts other than `verdict` only where the verdict's reward reaches this; null: always."""
    false_positive: float = Field(0.0, ge=0, lt=1)
    """Share of wrong answers that the verifier accepts. With false_negative it corrects the verdict's reward v to
    (v - false_positive) / (1 - false_positive - false_negative), whose expectation is that of a perfect verifier."""
    false_negative: float = Field(0.0, ge=0, lt=1)
    """Share of right answers that the verifier rejects."""

    @model_validator(mode="after")
    def _verifier_knows_something(self) -> RewardConfig:
        if self.false_positive + self.false_negative >= 1:
            remedy = f"with false_positive = {self.false_positive} it must stay below 1: the verifier would only guess"
            raise UserError("reward.false_negative", self.false_negative, remedy)
        return self
