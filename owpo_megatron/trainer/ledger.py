"""Memory of a run between steps: a record of every prompt, and right responses that may be used again.

Both are kept on global rank 0, only where the method asks for them, and go into checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, replace
from typing import Any

from owpo_megatron.run.rollouts import parse_rollout, plain_rollout
from owpo_megatron.types import Group, PromptRecord, Rollout


class PromptLedger:
    """Records of the prompts that were drawn, by their ids.

    Args:
        forgetting: discount of the Beta counts at each visit, in (0, 1].
        first_counts: Beta counts (right, wrong) before the first visit.

    Example:
        >>> ledger = PromptLedger(forgetting=0.9, first_counts=(2.0, 6.0))
        >>> ledger.visit("p/1", [1.0], step=3)
        >>> record = ledger.record("p/1")
        >>> record.visits, record.mean, round(record.right / (record.right + record.wrong), 5)
        (1, 1.0, 0.34146)
    """

    def __init__(self, forgetting: float = 1.0, first_counts: tuple[float, float] = (0.0, 0.0)):
        assert 0 < forgetting <= 1
        self._forgetting = forgetting
        self._first_counts = first_counts
        self._records: dict[str, PromptRecord] = {}

    def record(self, prompt_id: str) -> PromptRecord | None:
        return self._records.get(prompt_id)

    def visit(self, prompt_id: str, rewards: Sequence[float], step: int) -> None:
        """Add a group's rewards to the record of its prompt.

        Args:
            rewards: the verifier's, of the siblings that count.
            step: steps done before this one.
        """
        right, wrong = self._first_counts
        record = self._records.get(prompt_id) or PromptRecord(0, 0, 0.0, 0.0, step, right, wrong)
        count, mean, squares = record.responses, record.mean, record.squares
        for reward in rewards:  # Welford's update
            count += 1
            away = reward - mean
            mean += away / count
            squares += away * (reward - mean)
        total = sum(rewards)
        self._records[prompt_id] = PromptRecord(
            visits=record.visits + 1,
            responses=count,
            mean=mean,
            squares=squares,
            last_step=step,
            right=self._forgetting * record.right + total,
            wrong=self._forgetting * record.wrong + len(rewards) - total,
        )

    def state_dict(self) -> dict[str, Any]:
        return {name: list(astuple(record)) for name, record in self._records.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._records = {name: PromptRecord(*values) for name, values in state.items()}


class SamplePool:
    """Right responses of earlier steps, with the log-probs that they were sampled with.

    Args:
        per_prompt: responses kept per prompt; the oldest goes first.
    """

    def __init__(self, per_prompt: int):
        self._per_prompt = per_prompt
        self._rollouts: dict[str, list[Rollout]] = {}

    def stored(self, prompt_id: str) -> Sequence[Rollout]:
        """Stored responses of a prompt, oldest first."""
        return tuple(self._rollouts.get(prompt_id, ()))

    def add(self, groups: Iterable[Group]) -> None:
        """Store the right responses that the policy wrote to these prompts."""
        for group in groups:
            for rollout, verdict in zip(group.rollouts, group.verdicts, strict=True):
                if verdict.correct and rollout.origin == "policy" and not rollout.keeps_old:
                    kept = self._rollouts.setdefault(rollout.prompt.id, [])
                    kept.append(replace(rollout, origin="replay", keeps_old=True))
                    del kept[: -self._per_prompt]

    def state_dict(self) -> dict[str, Any]:
        return {name: [plain_rollout(one) for one in kept] for name, kept in self._rollouts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rollouts = {name: [parse_rollout(one) for one in kept] for name, kept in state.items()}
