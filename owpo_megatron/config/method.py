"""The sections `algorithm:` and `rollout:`: how the policy learns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from owpo_megatron.config.file import Section
from owpo_megatron.errors import UserError

AlgorithmName = Literal[
    "owpo", "owpo_no_asym", "owpo_no_locking", "owpo_no_accel", "grpo", "dapo", "sym_dapo", "opd", "mopd"
]
DYNAMIC_SAMPLING = ("owpo", "owpo_no_asym", "owpo_no_locking", "owpo_no_accel", "dapo", "sym_dapo")
"""The methods that train on groups with unequal verdicts only."""
METHODS_WITH = {
    "weight_low": ("owpo", "owpo_no_asym", "owpo_no_locking", "owpo_no_accel"),
    "weight_high": ("owpo", "owpo_no_asym", "owpo_no_locking", "owpo_no_accel"),
    "beta": ("grpo", "sym_dapo"),
    "alpha": ("mopd",),
}
"""Hyper-parameters that only some methods have."""


class AlgorithmConfig(Section):
    name: AlgorithmName = "owpo"
    """The method; `owpo methods` lists them."""
    clip_low: float | None = Field(None, gt=0, lt=1)
    """Lower clip range of the ratio; None: the method's own."""
    clip_high: float | None = Field(None, gt=0)
    """Upper clip range of the ratio; None: the method's own."""
    weight_low: float | None = Field(None, gt=0, le=1)
    """Lower bound of OWPO's weight w (paper: 0.8)."""
    weight_high: float | None = Field(None, ge=1)
    """Upper bound of OWPO's weight w (paper: 1.2)."""
    beta: float | None = Field(None, ge=0)
    """Coefficient of the k3 penalty (grpo, sym_dapo)."""
    alpha: float | None = Field(None, ge=0)
    """Weight of the outcome advantage (mopd)."""
    curriculum: bool = True
    """Active samples of a group fall linearly from group_size to 1 within a stage; False: all stay active."""
    advantage_std: Literal["unbiased", "population"] = "unbiased"
    """Which standard deviation normalises a group's rewards."""
    tis_cap: float | None = Field(None, ge=1)
    """Truncated importance sampling: each token's loss times min(trainer's / engine's probability, this); None: off."""

    @model_validator(mode="after")
    def _has_its_hyper_parameters(self) -> AlgorithmConfig:
        for name, methods in METHODS_WITH.items():
            value = getattr(self, name)
            if value is not None and self.name not in methods:
                remedy = f"{self.name} has no {name}; leave it out, or use one of {', '.join(methods)}"
                raise UserError(f"algorithm.{name}", value, remedy)
        return self

    def overrides(self) -> dict[str, float]:
        """Hyper-parameters that were set, by the objective's own field names."""
        names = ("clip_low", "clip_high", "weight_low", "weight_high", "beta", "alpha", "tis_cap")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class RolloutConfig(Section):
    prompts_per_step: int = Field(512, gt=0)
    """Prompts that each step trains on."""
    group_size: int = Field(16, ge=2)
    """Responses per prompt."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature, also of the log-probs that the loss uses."""
    max_response_tokens: int = Field(8192, gt=0)
    """Longest response; a longer one is cut off."""
    max_rounds: int = Field(4, ge=1)
    """Generation rounds a step may take to fill its prompts with groups whose verdicts differ."""
    oversampling: float = Field(1.0, ge=1)
    """Prompts drawn for each one that is missing: above 1, fewer rounds and more surplus groups (dropped)."""
    overlong_tokens: int = Field(0, ge=0)
    """DAPO's soft punishment (there 4096): the reward falls linearly over the last so many tokens before
    max_response_tokens; 0: off. Dynamic sampling looks at the verifier's reward, without it."""
    overlong_penalty: float = Field(0.5, gt=0)
    """Reward taken from a response of max_response_tokens. Rewards here are 0 and 1; 0.5 is DAPO's 1 of -1 and 1."""
    mask_truncated: bool = False
    """Responses cut off at max_response_tokens leave the loss, their group's statistics and dynamic sampling."""
    save: bool = True
    """Keep every step's rollouts in the run folder (rollouts/), where `rollout.replay` can read them."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end a response, besides the end-of-sequence tokens, e.g. ["Question:"]. The text itself is kept."""
    replay: Path | None = None
    """Take rollouts from this folder instead of an engine (made by a run with `save`)."""

    @model_validator(mode="after")
    def _long_answers_one_way(self) -> RolloutConfig:
        if self.overlong_tokens > self.max_response_tokens:
            raise UserError(
                "rollout.overlong_tokens",
                self.overlong_tokens,
                f"cannot exceed rollout.max_response_tokens = {self.max_response_tokens}",
            )
        if self.overlong_tokens and self.mask_truncated:
            raise UserError(
                "rollout.mask_truncated",
                True,
                "with overlong_tokens it would reward running into the limit: nearly too long is punished, too long "
                "is not; use one of the two",
            )
        return self
