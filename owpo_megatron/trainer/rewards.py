"""Select the responses that count, and shape rewards: the verifier's, minus DAPO's overlong punishment.

There are two rewards. The *verifier's* (0 or 1) decides which groups dynamic sampling keeps and is what the metrics
call reward: a group that is entirely wrong carries no signal about right and wrong, however its lengths differ. The
*shaped* one is only used for advantages, before they are normalised.

Source: DAPO (arXiv:2503.14476), section 3.4, Eq. 13.
"""

from __future__ import annotations

from dataclasses import dataclass

from owpo_megatron.config import RolloutConfig, VerifierConfig
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
    """

    max_tokens: int
    overlong_tokens: int = 0
    overlong_penalty: float = 0.5
    mask_truncated: bool = False
    mask_failures: bool = True

    @classmethod
    def of(cls, rollout: RolloutConfig, verifier: VerifierConfig) -> RewardRules:
        return cls(
            rollout.max_response_tokens,
            rollout.overlong_tokens,
            rollout.overlong_penalty,
            rollout.mask_truncated,
            verifier.mask_failures,
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

    def shaped(self, group: Group) -> list[float]:
        """[G] rewards that the advantages are made of."""
        return [
            reward - self.penalty(len(rollout.response_ids))
            for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
        ]
