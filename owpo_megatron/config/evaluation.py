"""Section `eval:`: when a run evaluates, on which sets, and the estimators."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from owpo_megatron.config.file import Section
from owpo_megatron.config.verifier import OwnRule, Rule
from owpo_megatron.errors import UserError

Instruction = Literal["boxed", "dapo", "none"]
Estimator = Literal["unbiased", "bootstrap"]


class SetConfig(Section):
    """A built-in set (`owpo eval --list`) or your own file (`source`). A field left null keeps the built-in value."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Name of a built-in set, or of your own."""
    source: str | None = None
    """A .jsonl, .parquet or .csv file, or `task:NAME` for a generated task's test split."""
    samples: int | None = Field(None, gt=0)
    """Samples per problem."""
    temperature: float | None = Field(None, gt=0)
    """Sampling temperature."""
    top_p: float | None = Field(None, gt=0, le=1)
    """Nucleus sampling threshold."""
    limit: int | None = Field(None, gt=0)
    """Use only the first problems."""
    pass_at: list[Annotated[int, Field(gt=0)]] | None = Field(None, min_length=1)
    """Values of k for Pass@k."""
    rule: Rule | None = None
    """The verifier's rule, as `verifier.rule`."""
    chain: OwnRule | None = None
    """As `eval.chain`."""
    instruction: Instruction | None = None
    """As `eval.instruction`."""
    pass_estimator: Estimator | None = None
    """As `eval.pass_estimator`."""

    @model_validator(mode="before")
    @classmethod
    def _a_name_alone(cls, raw: Any) -> Any:
        return {"name": raw} if isinstance(raw, str) else raw


class EvalConfig(Section):
    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before and after."""
    before: bool = True
    """Evaluate before the first step."""
    after: bool = True
    """Evaluate after the last step."""
    samples: int = Field(8, gt=0)
    """Samples per problem."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(0.7, gt=0, le=1)
    """Nucleus sampling threshold."""
    limit: int | None = Field(None, gt=0)
    """Use only the first problems of the set; null: all."""
    pass_at: list[Annotated[int, Field(gt=0)]] = Field([1, 8], min_length=1)
    """Values of k for Pass@k; each at most `samples`."""
    pass_estimator: Estimator = "unbiased"
    """Pass@k from n samples: `unbiased`, k of them without replacement; `bootstrap`, with replacement, which is lower
    where few are right."""
    chain: OwnRule | None = None
    """A second rule that judges the reasoning of every right response, for CoT-Pass@k beside Pass@k: answer right and
    reasoning accepted. `judge:FILE.yaml`, `ensemble:FILE.yaml`, `python:module:function` or a URL; null: none."""
    instruction: Instruction = "boxed"
    """With a chat template, the instruction for the answer in problems that have none: to box it; `dapo`, the sentences
    of DAPO's training prompts; or `none`. Not for a run's held-out problems, which are as in training."""
    sets: list[SetConfig] = []
    """Evaluation sets, each with fields of its own; a plain name is short for `{name: ...}`. Empty: the held-out
    problems of `data`, with the fields above."""
    primary: str | None = None
    """Set whose scores are used for curves and for choosing the best checkpoint; null: the first of `sets`."""
    data_dir: Path | None = None
    """Folder with the files of built-in sets; null: that of the variable OWPO_DATA. Missing files come from the hub."""

    @model_validator(mode="after")
    def _sets_are_told_apart(self) -> EvalConfig:
        names = [one.name for one in self.sets]
        if len(set(names)) < len(names):
            raise UserError("eval.sets", ", ".join(names), "a set is named twice; give each its own name")
        if self.primary is not None and self.primary not in names:
            raise UserError("eval.primary", self.primary, f"must be one of eval.sets: {', '.join(names) or '(empty)'}")
        return self
