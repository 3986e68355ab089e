"""Sections `algorithm:` and `rollout:`: how the policy learns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from owpo_megatron.config.file import Section
from owpo_megatron.errors import UserError
from owpo_megatron.methods.catalogue import check_hyper_parameters, find_method, is_hyper_parameter
from owpo_megatron.methods.method import Divisor, Method


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
    """Decrease the active samples of a group linearly from group_size to 1 within a stage; false: all stay active."""
    advantage_std: Literal["unbiased", "population"] = "unbiased"
    """Standard deviation that normalises a group's rewards."""
    divide_by: Divisor | None = None
    """Divisor of a minibatch's sum: `tokens`; `samples`: a sample's tokens, then samples; `sample_sums`: samples alone.
    null: as the method declares (`owpo methods`)."""
    active_by: Literal["shaped", "verifier"] = "shaped"
    """Advantages whose size decides which samples are active: those of the shaped rewards, which the loss uses, or of
    the verifier's alone, so that being overlong makes no sample active."""
    tis_cap: float | None = Field(None, ge=1)
    """Truncated importance sampling: multiply a token's loss by min(trainer / engine probability, this); null: off."""
    entropy_coef: float = Field(0.0, ge=0)
    """Entropy bonus: subtract this times the policy's mean entropy per token from the loss, with its exact gradient."""

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
        """Return the arguments of `make_method`: the hyper-parameters that were set, and the fields of every method."""
        common: dict[str, Any] = {
            "tis_cap": self.tis_cap,
            "entropy_coef": self.entropy_coef,
            "advantage_std": self.advantage_std,
        }
        common["divide_by"] = self.divide_by
        return common | dict(self.model_extra or {})


class RolloutConfig(Section):
    prompts_per_step: int = Field(512, gt=0)
    """Prompts that each step trains on."""
    group_size: int = Field(16, ge=2)
    """Responses per prompt."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature, also of the log-probs that the loss uses."""
    max_response_tokens: int = Field(8192, gt=0)
    """Maximum response length in tokens; longer responses are truncated."""
    dynamic_sampling: bool | None = None
    """Replace groups whose verdicts are all equal. null: as the method declares (`owpo methods`); true also for opd,
    mopd and grpo, which keep every group by themselves; false: keep every group."""
    plan: MethodName | None = None
    """Method whose way of asking for responses is used, e.g. `dars` with algorithm.name owpo; null: the algorithm's."""
    plan_settings: dict[str, Any] = {}
    """Hyper-parameters of `plan`, e.g. {most: 64}."""
    max_rounds: int = Field(4, ge=1)
    """Maximum generation rounds per step to find groups whose verdicts differ."""
    oversampling: float = Field(1.0, ge=1)
    """Prompts drawn per missing group; above 1: fewer rounds, more surplus groups (dropped)."""
    overlong_tokens: int = Field(0, ge=0)
    """DAPO's soft overlong punishment (4096 in the paper): the reward decreases linearly over this many tokens before
    max_response_tokens; 0: off. Dynamic sampling uses the verifier's reward, without it."""
    overlong_penalty: float = Field(0.5, gt=0)
    """Reward subtracted at max_response_tokens. With rewards of 0 and 1, 0.5 equals DAPO's 1 for -1 and 1."""
    mask_truncated: bool = False
    """Exclude responses truncated at max_response_tokens from the loss, group statistics and dynamic sampling."""
    max_staleness: int = Field(0, ge=0)
    """Steps by which the weights that sample a token may be behind those that are trained on it. 0: generation and
    training take turns. 1: the next step's responses are drawn during this step's update. Above 0 needs
    `algorithm.tis_cap`."""
    surplus: float = Field(0.0, ge=0, le=1)
    """Groups that are generated beyond a step's own, as a share of prompts_per_step. The step takes the groups that are
    complete first; the other responses are cut, keep their tokens and go on in the next step. Above 0 needs
    `max_staleness` of 2 or more. 0: each step waits for its longest response."""
    save: bool = True
    """Save every step's rollouts in the run folder (rollouts/), for `rollout.replay`."""
    save_tokens: int = Field(4, ge=0)
    """With `save`: prompts per step whose old and reference log-probs per token are kept, for `owpo samples`."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end a response, besides the end-of-sequence tokens, e.g. ["Question:"]. The text stays in it."""
    deterministic: Literal["auto"] | bool = "auto"
    """`true`: a response depends on its seed and the weights alone, not on what is generated beside it; on a GPU SGLang
    reports 34 % more time for it. `false`: on a CPU the products of a batch may round in another order, and seeds are
    kept; on a GPU, where SGLang reads seeds in its deterministic mode alone, they are given up too, and resuming does
    not repeat a run. `auto`: true on a CPU, false on a GPU."""
    routing_replay: bool = False
    """For mixtures of experts: the engine returns the experts that it routed each token to, and the policy's passes use
    these, with its own router's probabilities of them. Reference and teachers choose for themselves. `false`: every
    pass chooses."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Processes that ask engines for responses, read and grade them for rank 0, spread over the trainer's nodes; each
    has the grading processes of `verifier.workers`. 0: rank 0 does it itself. `auto`: one per node, and 0 on one node.
    """
    replay: Path | None = None
    """Folder of rollouts, saved by a run with `save`, to use instead of an engine; null: generate."""

    def keeps_mixed_groups(self, method: Method | type[Method]) -> bool:
        """Whether groups whose verdicts are all equal are dropped and replaced with this method."""
        return method.groups == "mixed" if self.dynamic_sampling is None else self.dynamic_sampling

    @model_validator(mode="after")
    def _plan_has_its_settings(self) -> RolloutConfig:
        if self.plan_settings and self.plan is None:
            raise UserError(
                "rollout.plan_settings", self.plan_settings, "name the method in rollout.plan, or leave out"
            )
        if self.plan is not None:
            try:
                self.plan_settings.update(check_hyper_parameters(find_method(self.plan), self.plan_settings))
            except UserError as error:
                raise UserError("rollout.plan_settings", self.plan_settings, error.remedy) from error
        return self

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
                "with overlong_tokens it would reward reaching the limit: almost too long is punished, too long "
                "is not; use one of the two",
            )
        return self
