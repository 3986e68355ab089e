"""Verdicts of episodes: their environment's own where it gave a reward, else those of the verifier's rule."""

from __future__ import annotations

from collections.abc import Sequence

from owpo_megatron.types import GradingItem, Verdict, Verdicts, Verifier


class EpisodeVerifier:
    """A `Verifier` that knows what environments have judged.

    Args:
        rule: grades the rest; closed with this one.
    """

    def __init__(self, rule: Verifier):
        self._rule = rule

    def score(self, items: Sequence[GradingItem]) -> list[Verdict]:
        return self.submit(items).result()

    def submit(self, items: Sequence[GradingItem]) -> Verdicts:
        left = [item for item in items if item.judgement is None]
        return _Mixed(items, self._rule.submit(left))

    def close(self) -> None:
        self._rule.close()


class _Mixed:
    """Verdicts in the order of the items."""

    def __init__(self, items: Sequence[GradingItem], of_rule: Verdicts):
        self._items, self._of_rule = items, of_rule

    def done(self) -> bool:
        return self._of_rule.done()

    def result(self) -> list[Verdict]:
        by_rule = iter(self._of_rule.result())
        return [
            next(by_rule) if item.judgement is None else Verdict.of(item.judgement, 0.0, item.judgement.detail)
            for item in self._items
        ]
