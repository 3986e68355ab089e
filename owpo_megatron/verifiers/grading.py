"""The verdicts of items that are being graded: what `submit` returns; and what to do when none could be."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from owpo_megatron.errors import UserError
from owpo_megatron.types import Verdict

FAILURES = ("timeout", "crashed")
"""Reasons that are no judgement of the answer."""


def refuse_failed_grading(verdicts: Sequence[Verdict], rule: str, field: str = "verifier.rule") -> None:
    """Stop where not one answer was graded: masked samples train nothing, and a score of them means nothing.

    Raises:
        UserError: every verdict is a failure of the rule; the first one's own words are in the message.
    """
    if not verdicts or any(verdict.reason not in FAILURES for verdict in verdicts):
        return
    counts = ", ".join(f"{count} {reason}" for reason, count in sorted(Counter(one.reason for one in verdicts).items()))
    why = next((one.detail for one in verdicts if one.detail), "")
    remedy = f"no answer could be graded ({counts}){': ' + why if why else ''}; try it with owpo verify --rule {rule}"
    if all(one.reason == "timeout" for one in verdicts):
        remedy += ", or raise verifier.timeout"
    raise UserError(field, rule, remedy)


class Grading:
    """Verdicts in submission order, some of them pending. Safe to use from any thread."""

    def __init__(self, count: int):
        self._verdicts: list[Verdict | None] = [None] * count
        self._missing = count
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self.cancelled = False

    @property
    def finished(self) -> int:
        """Number of verdicts so far."""
        return len(self._verdicts) - self._missing

    def wait(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds for all verdicts; return whether `result` would return at once."""
        with self._changed:
            return self._changed.wait_for(self.done, timeout)

    def done(self) -> bool:
        return self._missing == 0 or self._error is not None

    def result(self, timeout: float | None = None) -> list[Verdict]:
        """Wait for all verdicts.

        Raises:
            TimeoutError: not all are there after `timeout` seconds.
            RuntimeError: the pool was closed meanwhile, or its workers do not start.
        """
        with self._changed:
            if not self._changed.wait_for(self.done, timeout):
                raise TimeoutError(f"{self._missing} of {len(self._verdicts)} answers are not graded yet")
        if self._error is not None:
            raise self._error
        return [verdict for verdict in self._verdicts if verdict is not None]

    def cancel(self) -> None:
        """Skip items that have not begun; `result` must not be called afterwards."""
        self.cancelled = True

    def put(self, index: int, verdict: Verdict) -> None:
        with self._changed:
            assert self._verdicts[index] is None, "an item has one verdict"
            self._verdicts[index] = verdict
            self._missing -= 1
            if not self._missing:
                self._changed.notify_all()

    def fail(self, error: Exception) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()
