"""Sections `reference:` and `teachers:`: the policies that the policy is compared with."""

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
    """With best_of_stage: start each stage from its reference with a fresh optimizer, not from the last policy."""
    path: Path | None = None
    """Weights of the first reference, of the policy's shape: an HF folder, a converted megatron folder, or a checkpoint
    (checkpoints/step_N) or best/ of a run; null: the initial policy."""
    placement: Placement = "resident"
    """Memory of the reference: on the device, or in host memory, streamed in for its pass; a swap then copies."""

    @model_validator(mode="after")
    def _restarts_at_a_best(self) -> ReferenceConfig:
        if self.restart_policy and self.refresh != "best_of_stage":
            raise UserError("reference.restart_policy", True, "needs reference.refresh best_of_stage")
        return self


class TeacherConfig(Section):
    """A teacher, used instead of the reference: weights in a further slot of the policy's model, or running servers."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Name in logs and metrics."""
    domains: list[str] = []
    """Domains of prompts that it teaches; empty: every domain without another teacher."""
    path: Path | None = None
    """Weights of the policy's shape, in any form that `reference.path` accepts."""
    urls: list[str] = []
    """SGLang servers of one model with the policy's vocabulary, of any size. Log-probs are at temperature 1."""
    placement: Placement = "resident"
    """Memory of the weights in `path`: on the device, or in host memory, streamed in for their pass."""

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherConfig:
        if (self.path is None) == (not self.urls):
            raise UserError(f"teachers ({self.name})", self.path or "(neither)", "set either path or urls")
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise UserError(f"teachers ({self.name}) urls", url, "write whole URLs, e.g. http://127.0.0.1:30000")
        return self


def check_reference(reference: ReferenceConfig, eval_every: int) -> None:
    """Raise UserError if the stages have no evaluation to choose from."""
    if reference.refresh == "best_of_stage" and not 0 < eval_every <= reference.every:
        raise UserError(
            "eval.every",
            eval_every,
            "reference.refresh best_of_stage chooses among a stage's evaluations; set it between 1 and "
            f"reference.every = {reference.every}",
        )


def check_whole_vocabulary(method: Method, teachers: Sequence[TeacherConfig], head: str, tis_cap: float | None) -> None:
    """Refuse what a comparison of the whole vocabulary cannot have.

    Raises:
        UserError: the teacher's weights are not here, the head is not exact, or a token would be weighed.
    """
    if not method.whole_vocabulary:
        return
    what = f"{method.name} with vocabulary full"
    for teacher in teachers:
        if teacher.urls:
            remedy = f"{what} needs the teacher's weights, and servers return the sampled tokens' log-probs alone"
            raise UserError(f"teachers ({teacher.name}) urls", ", ".join(teacher.urls), f"{remedy}; use path")
    if head != "exact":
        raise UserError("model.head", head, f"{what} is exact alone; set model.head exact")
    if tis_cap is not None:
        raise UserError("algorithm.tis_cap", tis_cap, f"{what} weighs no sampled token; leave it out")


def check_teachers(
    teachers: Sequence[TeacherConfig], method: type[Method], reference: ReferenceConfig, temperature: float
) -> None:
    """Refuse teachers that the method does not support, or that contradict each other.

    Raises:
        UserError: a teacher is not allowed; the message names it.
    """
    if not teachers:
        return
    names = [teacher.name for teacher in teachers]
    if method.reference != "teacher":
        taught = [other.name for other in catalogue().values() if other.reference == "teacher"]
        remedy = f"{method.name} has no teachers; leave them out, or use {' or '.join(taught)}"
        if method.reference == "active":
            remedy = (
                f"{method.name} compares the policy with its own reference through one kernel (paper, Eq. 5): "
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
            raise UserError("teachers", ", ".join(twice), f"two teachers have this {label}; give it to one of them")
    for teacher in teachers:
        if teacher.urls and temperature != 1:
            raise UserError(
                f"teachers ({teacher.name}) urls",
                ", ".join(teacher.urls),
                f"servers return log-probs at temperature 1, but rollout.temperature is {temperature:g}; "
                "set it to 1, or use path",
            )
