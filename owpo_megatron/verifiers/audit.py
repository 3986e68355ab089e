"""Audit of a verifier: a second rule judges a share of the responses, which gives the first one's error rates.

The rates are what `reward.false_positive` and `reward.false_negative` correct for. They are those of the second rule's
truth: audit a cheap rule with a dear one (a stricter comparison, a judge).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from owpo_megatron.types import GradingItem, Verdict, Verdicts, Verifier
from owpo_megatron.verifiers.grading import FAILURES

COUNTS = ("right", "rejected", "wrong", "accepted")


class AuditedVerifier:
    """A `Verifier` whose verdicts are those of the first rule; a share of its items is given to the second as well.

    Whether an item is audited depends on the seed and on its texts alone.

    Args:
        verifier, auditor: the first and the second.
        share: share of the items that is audited, in (0, 1].
        seed: the run's seed.
    """

    def __init__(self, verifier: Verifier, auditor: Verifier, share: float, seed: int):
        self._verifier, self._auditor = verifier, auditor
        self._share, self._seed = share, seed
        self._counts = dict.fromkeys(COUNTS, 0)

    def score(self, items: Sequence[GradingItem]) -> list[Verdict]:
        return self.submit(items).result()

    def submit(self, items: Sequence[GradingItem]) -> Verdicts:
        chosen = [index for index, item in enumerate(items) if self.audits(item)]
        verdicts = self._verifier.submit(items)
        return _Audited(self, verdicts, chosen, self._auditor.submit([items[index] for index in chosen]))

    def close(self) -> None:
        self._auditor.close()
        self._verifier.close()

    def audits(self, item: GradingItem) -> bool:
        """Whether an item is among the share."""
        text = f"{self._seed}\0{item.prompt}\0{item.answer}\0{item.response}"
        digest = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") < self._share * 2**64

    def note(self, verdict: Verdict, truth: Verdict) -> None:
        """Count a pair of verdicts; one that failed is left out."""
        if verdict.reason in FAILURES or truth.reason in FAILURES:
            return
        self._counts["right" if truth.correct else "wrong"] += 1
        if verdict.correct != truth.correct:
            self._counts["rejected" if truth.correct else "accepted"] += 1

    def taken(self) -> dict[str, int]:
        """Counts since the last call: `right` and `wrong` by the second rule, `rejected` and `accepted` of those."""
        counts, self._counts = self._counts, dict.fromkeys(COUNTS, 0)
        return counts


@dataclass(frozen=True)
class _Audited:
    """Verdicts of the first rule, whose result counts the second one's."""

    audit: AuditedVerifier
    verdicts: Verdicts
    chosen: Sequence[int]
    truths: Verdicts

    def done(self) -> bool:
        return self.verdicts.done() and self.truths.done()

    def result(self) -> list[Verdict]:
        found = self.verdicts.result()
        for index, truth in zip(self.chosen, self.truths.result(), strict=True):
            self.audit.note(found[index], truth)
        return found


@dataclass(frozen=True)
class ErrorRate:
    """A share of verdicts with its 95 % interval (Wilson's score interval).

    Example:
        >>> ErrorRate.of(3, 100).low < 0.03 < ErrorRate.of(3, 100).high
        True
    """

    value: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, errors: int, count: int) -> ErrorRate:
        if count == 0:
            return cls(0.0, 0.0, 1.0, 0)
        z, share = 1.959963984540054, errors / count
        centre = (share + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
        return cls(share, max(centre - half, 0.0), min(centre + half, 1.0), count)


def error_rates(lines: Iterable[Mapping[str, Any]]) -> dict[str, ErrorRate]:
    """`false_positive` and `false_negative` of a run's verifier, from the lines of its metrics.

    Example:
        error_rates(load_run("runs/a").steps)["false_positive"]  # ErrorRate(value=0.031, low=0.018, ...)
    """
    total = dict.fromkeys(COUNTS, 0)
    for line in lines:
        for name, count in (line.get("audit") or {}).items():
            total[name] += count
    return {
        "false_positive": ErrorRate.of(total["accepted"], total["wrong"]),
        "false_negative": ErrorRate.of(total["rejected"], total["right"]),
    }
