"""Checks of a run's steps: those that change nothing, and those whose numbers cannot be right. On global rank 0.

A step is marked in its line of metrics.jsonl (`trouble`) and reported; several in a row end the run with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from owpo_megatron.config import ChecksConfig, SyncConfig
from owpo_megatron.errors import RunError, UserError
from owpo_megatron.run.layout import RunFolder
from owpo_megatron.trainer.watchdog import Watchdog
from owpo_megatron.types import Verdict

FAILED = ("timeout", "crashed")
_MISMATCH = {"float32": 0.01, "bfloat16": 0.3}
_MISMATCH_FP8 = 0.6


def mismatch_bound(checks: ChecksConfig, sync: SyncConfig, dtype: str) -> float:
    """The largest mean |difference| of log-probs of a step: `checks.mismatch`, or far above what rounding leaves."""
    return checks.mismatch or (_MISMATCH_FP8 if sync.fp8 else _MISMATCH[dtype])


class StepChecks:
    """Judges finished steps by their lines; also a sink, which reports what it found and ends the run.

    Args:
        mismatch: the bound; None: not checked (replayed rollouts are another policy's).
        refuse: raises UserError where not one of these verdicts is of a graded answer.
        counts: of what was lost so far, by the name of its field in a step's line, e.g. engines that were restarted.
        report: prints a line for the person watching the run.
    """

    def __init__(
        self,
        config: ChecksConfig,
        mismatch: float | None,
        refuse: Callable[[Sequence[Verdict]], None],
        counts: Mapping[str, Callable[[], int]] | None = None,
        report: Callable[[str], None] = print,
    ):
        self._config = config
        self._mismatch = mismatch
        self._refuse = refuse
        self._counts = counts or {}
        self._counted = dict.fromkeys(self._counts, 0)
        self._report = report
        self._in_a_row = {"silent": 0, "mismatch": 0}
        self._ever_graded = False

    def verdicts(self, verdicts: Sequence[Verdict]) -> None:
        """Look at the verdicts of a round.

        Raises:
            UserError: not one answer was graded, nor ever before in this attempt. Later in a run that is a step that
                changes nothing, as when an endpoint is away for a while.
        """
        if self._ever_graded:
            return
        self._refuse(verdicts)
        self._ever_graded = bool(verdicts)

    def of(self, line: dict[str, Any]) -> dict[str, Any]:
        """Return what a line gets: `trouble`, names of what is wrong with the step, and counts of what was lost."""
        found: dict[str, Any] = {}
        trouble = [name for name, reason in (("silent", silence(line)), ("mismatch", self._off(line))) if reason]
        trouble += [name for name, value in line.items() if isinstance(value, float) and not _is_finite(value)]
        if trouble:
            found["trouble"] = trouble
        for name, count in self._counts.items():
            total = count()
            if total > self._counted[name]:
                found[name] = total - self._counted[name]
                self._counted[name] = total
        return found

    # ------------------------------------------------------------------------------------------ as a sink
    def step(self, line: dict[str, Any]) -> None:
        """Report a step's trouble when it begins, and end the run when it lasts.

        Raises:
            RunError: as many steps in a row as the configuration allows changed nothing, or were off.
        """
        self._count("silent", silence(line), line, self._config.silent_steps, "checks.silent_steps")
        self._count("mismatch", self._off(line), line, self._config.mismatch_steps, "checks.mismatch_steps")

    def evaluation(self, step: int, scores: dict[str, Any]) -> None:
        """Nothing to check."""

    def checkpoint(self, step: int, folder: Path) -> None:
        """Nothing to check."""

    def _count(self, name: str, reason: str | None, line: dict[str, Any], most: int, field: str) -> None:
        if reason is None:
            self._in_a_row[name] = 0
            return
        self._in_a_row[name] += 1
        count = self._in_a_row[name]
        if count == 1:
            self._report(f"[yellow]step {line['step']}:[/yellow] {reason}")
        if most and count >= most:
            raise RunError(f"step {line['step']} is number {count} in a row: {reason} ({field})")

    def _off(self, line: dict[str, Any]) -> str | None:
        found = line.get("mismatch")
        stale = line.get("policy_version", line["step"] - 1) != line["step"] - 1
        if self._mismatch is None or found is None or stale or found <= self._mismatch:
            return None
        return (
            f"mismatch {found:.3g}, the mean difference of trainer's and engine's log-probs, is above "
            f"{self._mismatch:g} (checks.mismatch): the engine does not compute with the policy's weights, which "
            "sync.verify=logprob would find, or the policy has become so sharp that rounding decides (look at entropy "
            "and grad_norm)"
        )


def silence(line: dict[str, Any]) -> str | None:
    """Why a step changed nothing; None: it did.

    Example:
        >>> silence({"step": 3, "updates": 2, "grad_norm": 0.4}) is None
        True
        >>> silence({"step": 3, "updates": 0, "groups": 0, "verifier": {"wrong": 8}})[:61]
        'nothing to learn from in this step: no group had right and wr'
    """
    if line.get("updates") and line.get("grad_norm") != 0.0:
        return None
    if line.get("updates_skipped") and not line.get("updates"):
        return "every update of this step was skipped: its gradients were not finite"
    counts = line.get("verifier", {})
    verdicts = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    if counts and all(reason in FAILED for reason in counts):
        return f"nothing to learn from in this step: not one answer was graded (verdicts: {verdicts})"
    if line.get("tokens_generated") == 0:
        return "nothing to learn from in this step: the responses have no tokens"
    if not line.get("groups"):
        return (
            f"nothing to learn from in this step: no group had right and wrong answers (verdicts: {verdicts}). The "
            "model must be right now and then, in the form that verifier.rule looks for"
        )
    return f"nothing to learn from in this step: its gradient is zero (verdicts: {verdicts})"


class BadGradients:
    """Handles updates whose gradient is not finite: the batch is kept, and the run ends or goes on without the update.

    Args:
        keep: saves the rollouts of the step under way on the rank that has them.
    """

    def __init__(
        self,
        config: ChecksConfig,
        folder: RunFolder,
        watchdog: Watchdog,
        keep: Callable[[], None],
        report: Callable[[str], None],
    ):
        self._skips = config.bad_gradient == "skip"
        self._folder = folder
        self._watchdog = watchdog
        self._keep = keep
        self._report = report

    def __call__(self, cause: str) -> None:
        """Called on every rank.

        Raises:
            RunError: with `checks.bad_gradient: stop`.
        """
        self._keep()
        step = self._watchdog.step
        text = f"step {step}: {cause} (again, number by number: owpo replay {self._folder.path} --step {step})"
        if not self._skips:
            raise RunError(text)
        self._report(f"[yellow]an update is skipped:[/yellow] {text}")


def no_weights_are_lost(path: Path, is_finite: bool) -> None:
    """Refuse a model with a weight that is no finite number, before the first step.

    Raises:
        UserError: there is one.
    """
    if not is_finite:
        raise UserError("model.path", path, "has weights that are not finite (NaN or infinity); use another folder")


def _is_finite(value: float) -> bool:
    return value - value == 0.0
