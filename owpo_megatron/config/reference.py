"""Sections on what the policy is compared with: the reference, and the teachers of opd and mopd."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from owpo_megatron.config.file import Section
from owpo_megatron.errors import UserError
from owpo_megatron.methods.catalogue import catalogue
from owpo_megatron.methods.method import Method, Refresh

Placement = Literal["resident", "offloaded"]


class ReferenceConfig(Section):
    refresh: Refresh | None = None
    """`interval`: hard swap to the policy every `every` steps (the ratchet); `best_of_stage`: then, but to the policy
    with the best Pass@1 of the stage's evaluations (every `eval.every` steps and at its end); `fixed`: never.
    None: the method's own (`fixed` for grpo, opd and mopd, `interval` for the others)."""
    every: int = Field(80, gt=0)
    """Steps of a stage."""
    restart_policy: bool = False
    """best_of_stage: the next stage starts from its reference, with a fresh optimizer, instead of the last policy."""
    path: Path | None = None
    """Start from these weights of the policy's shape: an HF folder, a converted megatron folder, or a checkpoint
    (checkpoints/step_N) or best/ of a run. None: the initial policy."""
    placement: Placement = "resident"
    """`offloaded`: kept in host memory and streamed in for its pass; a swap then copies."""

    @model_validator(mode="after")
    def _restarts_at_a_best(self) -> ReferenceConfig:
        if self.restart_policy and self.refresh != "best_of_stage":
            raise UserError("reference.restart_policy", True, "goes with reference.refresh best_of_stage only")
        return self


class TeacherConfig(Section):
    """A teacher, in place of the reference: weights in a further slot of the policy's model, or running servers."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Name in logs and metrics."""
    domains: list[str] = []
    """Domains of prompts that it teaches; empty: every domain that no other teacher names."""
    path: Path | None = None
    """Weights of the policy's shape, in any form that `reference.path` takes."""
    urls: list[str] = []
    """SGLang servers of one model with the policy's vocabulary, of any size. Log-probs are at temperature 1."""
    placement: Placement = "resident"
    """Of `path`: `offloaded` keeps the weights in host memory and streams them in for their pass."""

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        if (self.path is None) == (not self.urls):
            raise UserError(f"teachers ({self.name})", self.path or "(neither)", "give either path or urls")
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise UserError(f"teachers ({self.name}) urls", url, "write whole URLs, e.g. http://127.0.0.1:30000")
        return self


def check_reference(reference: ReferenceConfig, eval_every: int) -> None:
    """Raises UserError where the stages have nothing to choose from."""
    if reference.refresh == "best_of_stage" and not 0 < eval_every <= reference.every:
        raise UserError(
            "eval.every",
            eval_every,
            "reference.refresh best_of_stage chooses among a stage's evaluations; set it between 1 and "
            f"reference.every = {reference.every}",
        )


def check_teachers(
    teachers: Sequence[TeacherConfig], method: type[Method], reference: ReferenceConfig, temperature: float
) -> None:
    """Refuse teachers that the method cannot have, or that contradict each other.

    Raises:
        UserError: naming the teacher.
    """
    if not teachers:
        return
    names = [teacher.name for teacher in teachers]
    if method.reference != "teacher":
        taught = [other.name for other in catalogue().values() if other.reference == "teacher"]
        remedy = f"{method.name} has no teachers; leave them out, or use {' or '.join(taught)}"
        if method.reference == "active":
            remedy = (
                f"{method.name} weighs the policy against its own reference, through one kernel (paper, Eq. 5): "
                "another program's log-probs differ by more than rounding. Use reference.path"
            )
        raise UserError("teachers", ", ".join(names), remedy)
    if reference.path is not None:
        raise UserError("reference.path", reference.path, "teachers take the reference's place; leave one of them out")
    if method.max_teachers is not None and len(teachers) > method.max_teachers:
        several = [o.name for o in catalogue().values() if o.reference == "teacher" and o.max_teachers is None]
        most = "one teacher" if method.max_teachers == 1 else f"at most {method.max_teachers} teachers"
        remedy = f"{method.name} has {most}; use {' or '.join(several)} for several"
        raise UserError("teachers", ", ".join(names), remedy)
    for label, values in (
        ("name", names),
        ("domain", [domain for teacher in teachers for domain in teacher.domains or ["(all others)"]]),
    ):
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise UserError("teachers", ", ".join(twice), f"two teachers have this {label}; give it to one")
    for teacher in teachers:
        if teacher.urls and temperature != 1:
            raise UserError(
                f"teachers ({teacher.name}) urls",
                ", ".join(teacher.urls),
                f"servers give log-probs of given tokens at temperature 1, and rollout.temperature is {temperature:g}; "
                "set it to 1, or use path",
            )
