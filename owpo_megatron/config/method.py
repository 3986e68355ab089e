"""The sections `algorithm:` and `rollout:`: how the policy learns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from owpo_megatron.config.file import Section
from owpo_megatron.errors import UserError
from owpo_megatron.methods.catalogue import check_hyper_parameters, find_method, is_hyper_parameter


def _known_method(name: str) -> str:
    try:
        find_method(name)
    except UserError as error:
        raise ValueError(error.remedy) from error
    return name


MethodName = Annotated[str, AfterValidator(_known_method)]
"""A method of the catalogue, or `python:MODULE:CLASS`."""


class AlgorithmConfig(Section):
    """The method, and what every method has. The method's own hyper-parameters (methods.md) are fields of it too."""

    model_config = ConfigDict(extra="allow")

    name: MethodName = "owpo"
    """A method of `owpo methods`, or your own as `python:MODULE:CLASS`."""
    curriculum: bool = True
    """Active samples of a group fall linearly from group_size to 1 within a stage; False: all stay active."""
    advantage_std: Literal["unbiased", "population"] = "unbiased"
    """Which standard deviation normalises a group's rewards."""
    tis_cap: float | None = Field(None, ge=1)
    """Truncated importance sampling: each token's loss times min(trainer's / engine's probability, this); None: off."""
    entropy_coef: float = Field(0.0, ge=0)
    """Entropy bonus: the loss minus this times the policy's mean entropy per token, with its exact gradient."""

    @model_validator(mode="after")
    def _has_its_hyper_parameters(self) -> AlgorithmConfig:
        extra = self.model_extra
        assert extra is not None
        method = find_method(self.name)
        for name in [name for name, value in extra.items() if value is None]:
            if is_hyper_parameter(name):
                del extra[name]  # the method's own default, or a field of another method in an older resolved file
        extra.update(check_hyper_parameters(method, extra))
        return self

    def settings(self) -> dict[str, Any]:
        """What `make_method` needs: the hyper-parameters that were set, and the fields that every method has."""
        common = {"tis_cap": self.tis_cap, "entropy_coef": self.entropy_coef, "advantage_std": self.advantage_std}
        return common | dict(self.model_extra or {})


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
