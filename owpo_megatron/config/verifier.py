"""The section `verifier:`: how responses are graded."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from owpo_megatron.config.file import Section

_OWN = r"(?:judge|ensemble):.+|python:[\w.]+:\w+|https?://\S+"
_OWN_FORMS = "judge:FILE.yaml, ensemble:FILE.yaml, python:MODULE:FUNCTION, or the URL of an endpoint"


def known_rule(name: str) -> str:
    """The name of a rule, in one of its forms; whether a function or an endpoint exists is looked at later.

    Raises:
        ValueError: it has none of these forms; the message lists them.
    """
    from owpo_megatron.verifiers.rules import RULE_NAMES  # read when a rule is named: most runs keep `auto`

    if name in ("auto", *RULE_NAMES) or re.fullmatch(_OWN, name):
        return name
    known = ", ".join(("auto", *RULE_NAMES))
    raise ValueError(f"use one of {known}, {_OWN_FORMS}")


def own_rule(name: str) -> str:
    """The name of a rule of the user's own, for what no built-in rule judges.

    Raises:
        ValueError: it has none of these forms; the message lists them.
    """
    if re.fullmatch(_OWN, name):
        return name
    raise ValueError(f"the built-in rules judge answers alone; use {_OWN_FORMS}")


Rule = Annotated[str, AfterValidator(known_rule)]
OwnRule = Annotated[str, AfterValidator(own_rule)]


class VerifierConfig(Section):
    rule: Rule = "auto"
    """`auto`: the task's own rule, `math` for files. Or `judge:FILE.yaml` (a language model answers a
    rubric), `ensemble:FILE.yaml` (several reward models, combined), `python:module:function`, or the URL of an
    endpoint."""
    proxy: bool = False
    """Reach an endpoint through the environment's proxy (http_proxy); false: directly."""
    workers: int = Field(2, gt=0)
    """Grading processes."""
    timeout: float = Field(4.0, gt=0)
    """Seconds for grading one answer (`code`: all its tests); then its process is killed."""
    memory_gb: float = Field(2.0, gt=0)
    """Largest address space of a grading process, in GB."""
    sandbox: Literal["namespaces", "process"] = "namespaces"
    """Isolation of programs that the rule `code` runs: `namespaces` hides files, network and processes, and is refused
    where the kernel does not allow it; `process` limits time, memory and output only."""
    mask_failures: bool = True
    """Exclude answers whose grading timed out or crashed from the loss, instead of counting them as wrong."""
    audit: Rule | None = None
    """A second rule that judges a share of the training responses as well, for the first one's error rates
    (reward.false_positive and false_negative); null: none. Its verdicts are counted, and reward nothing."""
    audit_share: float = Field(0.05, gt=0, le=1)
    """Share of the training responses that `audit` judges."""
    flip: float = Field(0.0, ge=0, lt=1)
    """For research: probability of inverting a training reward. The choice depends only on the run's seed and the
    sample's position in the stream, so that methods with the same seed see the same noise. Evaluation is not
    affected."""
