"""Grades in this process: for rules that cannot hang or crash."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from owpo_megatron.types import GradingItem, Verdict
from owpo_megatron.verifiers.grading import Grading
from owpo_megatron.verifiers.rules import Rule


class DirectVerifier:
    """A `Verifier` for trivial rules.

    Args:
        rules: rule of each domain.
    """

    def __init__(self, rules: Mapping[str, Rule]):
        self._rules = dict(rules)

    def score(self, items: Sequence[GradingItem]) -> list[Verdict]:
        return [self._grade(item) for item in items]

    def submit(self, items: Sequence[GradingItem]) -> Grading:
        """As `VerifierPool.submit`; the verdicts are there at once."""
        grading = Grading(len(items))
        for index, item in enumerate(items):
            grading.put(index, self._grade(item))
        return grading

    def close(self) -> None:
        """Nothing to release."""

    def _grade(self, item: GradingItem) -> Verdict:
        start = time.perf_counter()
        reason = self._rules[item.domain](item)
        return Verdict(reason == "ok", reason, time.perf_counter() - start)
