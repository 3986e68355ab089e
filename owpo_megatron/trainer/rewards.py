"""Select the responses that count, and shape rewards: the verifier's, a rule's parts, DAPO's overlong punishment.

There are two rewards. The *verifier's* (0 or 1, or a graded score) decides which groups dynamic sampling keeps and is
what the metrics call reward: a group that is entirely wrong carries no signal about right and wrong, however its
lengths differ. The *shaped* one is only used for advantages, before they are normalised.

Sources: overlong punishment: DAPO (arXiv:2503.14476), section 3.4, Eq. 13; gate: G-RA (gated reward accumulation, Aug
2025: immediate rewards count once the long-term one reaches a threshold); correction: arXiv:2510.00915, "backward".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from owpo_megatron.config import RewardConfig, RolloutConfig, VerifierConfig
from owpo_megatron.errors import UserError
from owpo_megatron.types import Group

FAILED = ("timeout", "crashed")


@dataclass(frozen=True)
class RewardRules:
    """The rules of a run.

    Args:
        max_tokens: longest response, in tokens.
        overlong_tokens: the last so many before it, over which the penalty rises from 0; 0: no penalty.
        overlong_penalty: reward taken from a response of max_tokens.
        mask_truncated: responses that were cut off do not count.
        mask_failures: responses whose verification failed do not count.
        weights, gate, false_positive, false_negative: the section `reward`.
    """

    max_tokens: int
    overlong_tokens: int = 0
    overlong_penalty: float = 0.5
    mask_truncated: bool = False
    mask_failures: bool = True
    weights: Mapping[str, float] = field(default_factory=dict)
    gate: float | None = None
    false_positive: float = 0.0
    false_negative: float = 0.0

    @classmethod
    def of(cls, rollout: RolloutConfig, verifier: VerifierConfig, reward: RewardConfig | None = None) -> RewardRules:
        return cls(
            rollout.max_response_tokens,
            rollout.overlong_tokens,
            rollout.overlong_penalty,
            rollout.mask_truncated,
            verifier.mask_failures,
            **(reward or RewardConfig()).model_dump(),
        )

    def counts(self, group: Group) -> list[bool]:
        """[G] False: this sibling is out of the loss, of its group's mean and spread, and of dynamic sampling."""
        return [
            not (self.mask_failures and verdict.reason in FAILED)
            and not (self.mask_truncated and rollout.finish_reason == "length")
            for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True)
        ]

    def is_mixed(self, group: Group) -> bool:
        """True where siblings that count differ in the verifier's reward: dynamic sampling keeps such groups."""
        return len(set(self.counted(group))) > 1

    def counted(self, group: Group) -> list[float]:
        """The verifier's rewards of the siblings that count."""
        return [reward for reward, counts in zip(group.rewards, self.counts(group), strict=True) if counts]

    def penalty(self, length: int) -> float:
        """Reward taken from a response of this many tokens.

        Example:
            >>> rules = RewardRules(max_tokens=100, overlong_tokens=20, overlong_penalty=1.0)
            >>> [rules.penalty(length) for length in (80, 85, 100)]
            [0.0, 0.25, 1.0]
        """
        if not self.overlong_tokens:
            return 0.0
        over = length - (self.max_tokens - self.overlong_tokens)
        return self.overlong_penalty * min(max(over / self.overlong_tokens, 0.0), 1.0)

    def parts(self, group: Group) -> dict[str, list[float]]:
        """[G] each part of the reward before weights: `verdict` (corrected), `length`, `truncated`, the rule's.

        A part that the rule left out for a sibling is 0 there.
        """
        trust = 1 - self.false_positive - self.false_negative
        rollouts, told = group.rollouts, [verdict.parts or {} for verdict in group.verdicts]
        found = {
            "verdict": [(reward - self.false_positive) / trust for reward in group.rewards],
            "length": [rollout.generated_length / self.max_tokens for rollout in rollouts],
            "truncated": [float(rollout.finish_reason == "length") for rollout in rollouts],
        }
        names = sorted({name for one in told for name in one})
        return {name: [one.get(name, 0.0) for one in told] for name in names} | found

    def check_weights(self, groups: Sequence[Group]) -> None:
        """Refuse a weight of a part that none of the graded responses of a step has.

        Raises:
            UserError: naming the part, and those that there are.
        """
        known = {name for group in groups for name in self.parts(group)}
        unknown = sorted(set(self.weights) - known)
        if unknown and any(any(self.counts(group)) for group in groups):
            remedy = f"no rule returned such a part; use one of {', '.join(sorted(known))}"
            raise UserError(f"reward.weights.{unknown[0]}", self.weights[unknown[0]], remedy)

    def weight(self, part: str) -> float:
        """Factor of a part; that of the verdict is 1 unless it is set, that of the others 0."""
        return self.weights.get(part, 1.0 if part == "verdict" else 0.0)

    def shaped(self, group: Group) -> list[float]:
        """[G] rewards that the advantages are made of: the weighted parts, minus the overlong punishment."""
        parts = self.parts(group)
        total = [self.weight("verdict") * value for value in parts["verdict"]]
        for name in self.weights:
            if name != "verdict" and name in parts:
                opened = [self.gate is None or value >= self.gate for value in parts["verdict"]]
                total = [
                    so_far + self.weights[name] * value if is_open else so_far
                    for so_far, value, is_open in zip(total, parts[name], opened, strict=True)
                ]
        return [
            reward - self.penalty(rollout.generated_length)
            for rollout, reward in zip(group.rollouts, total, strict=True)
        ]
