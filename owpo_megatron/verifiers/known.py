"""Verdicts that come with the responses: those of rollout workers, which grade what they draw, and of environments."""

from __future__ import annotations

from collections.abc import Sequence

from owpo_megatron.types import GradingItem, Verdict, Verdicts, Verifier


class KnownVerdicts:
    """A `Verifier` that asks its rule only for what nobody has judged yet.

    Args:
        rule: grades the rest; closed with this one.
    """

    def __init__(self, rule: Verifier):
        self._rule = rule

    def score(self, items: Sequence[GradingItem]) -> list[Verdict]:
        return self.submit(items).result()

    def submit(self, items: Sequence[GradingItem]) -> Verdicts:
        left = [item for item in items if item.verdict is None]
        return _Mixed(items, self._rule.submit(left))

    def close(self) -> None:
        self._rule.close()


class _Mixed:
    """Verdicts in the order of the items."""

    def __init__(self, items: Sequence[GradingItem], of_rule: Verdicts):
        self._known = [item.verdict for item in items]
        self._of_rule = of_rule

    def done(self) -> bool:
        return self._of_rule.done()

    def result(self) -> list[Verdict]:
        by_rule = iter(self._of_rule.result())
        return [next(by_rule) if verdict is None else verdict for verdict in self._known]
