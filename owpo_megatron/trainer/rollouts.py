"""Collects a step's groups: prompts, responses, verdicts; dynamic sampling with a bounded number of rounds."""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from owpo_megatron.config import RolloutConfig
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.trainer.noise import RewardNoise
from owpo_megatron.trainer.rewards import RewardRules
from owpo_megatron.types import (
    GradingItem,
    Group,
    Progress,
    PromptStream,
    Rollout,
    RolloutEngine,
    SampleRequest,
    Sampling,
    StepLog,
    Verdict,
    Verdicts,
    Verifier,
)


def sample_seed(run_seed: int, draw: int, sibling: int) -> int:
    """31 bits that depend on the run, the prompt's place in the stream and the sibling, and on nothing else."""
    digest = hashlib.blake2b(f"{run_seed}/{draw}/{sibling}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


class RolloutCollector:
    """Implements Rollouts: global rank 0 generates and grades, every rank gets the groups.

    Args:
        config: the section `rollout`.
        seed: the run's seed.
        noise: rewards that are wrong on purpose (`verifier.flip`).
        engine, verifier, stream: of rank 0; None elsewhere.
        decode: token ids to text.
        check_verdicts: raises where not one of a round's answers could be graded.
        date: what the prompts' template printed as today; goes into checkpoints.
        record: called on rank 0 with (step, all groups that were generated, those of them that are kept).
    """

    def __init__(
        self,
        config: RolloutConfig,
        seed: int,
        rules: RewardRules,
        noise: RewardNoise,
        main: MainRank,
        engine: RolloutEngine | None,
        verifier: Verifier | None,
        stream: PromptStream | None,
        decode: Callable[[Sequence[int]], str],
        stop_token_ids: tuple[int, ...],
        dynamic_sampling: bool,
        record: Callable[[int, Sequence[Group], Sequence[Group]], None],
        progress: Progress | None = None,
        date: datetime.date | None = None,
        check_verdicts: Callable[[Sequence[Verdict]], None] = lambda verdicts: None,
    ):
        self._config = config
        self._seed = seed
        self._check_verdicts = check_verdicts
        self._rules = rules
        self._noise = noise
        self._main = main
        self._engine = engine
        self._verifier = verifier
        self._stream = stream
        self._decode = decode
        self._dynamic = dynamic_sampling
        self._record = record
        self._progress = progress
        self._date = date
        self._drawn = 0  # prompts taken from the stream since the run began
        self._sampling = Sampling(
            config.max_response_tokens,
            config.temperature,
            stop_token_ids=stop_token_ids,
            stop=tuple(config.stop),
        )

    def collect(self, step: int, log: StepLog) -> list[Group]:
        groups, facts = self._main.run(lambda: self._collect_on_main(step, log))
        log.add(**facts)
        return groups

    def state_dict(self) -> dict[str, Any]:
        assert self._stream is not None
        date = {} if self._date is None else {"date": self._date.isoformat()}
        return {"drawn": self._drawn, "stream": self._stream.state_dict()} | date

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self._stream is not None
        self._drawn = state["drawn"]
        self._stream.load_state_dict(state["stream"])

    def _collect_on_main(self, step: int, log: StepLog) -> tuple[list[Group], dict[str, Any]]:
        wanted = self._config.prompts_per_step
        kept: list[Group] = []
        seen: list[Group] = []
        rounds = 0
        while len(kept) < wanted and rounds < (self._config.max_rounds if self._dynamic else 1):
            rounds += 1
            fresh = self._generate(self._how_many(wanted, len(kept), len(seen)), log)
            seen.extend(fresh)
            kept.extend(group for group in fresh if not self._dynamic or self._rules.is_mixed(group))
        kept = kept[:wanted]
        self._record(step, seen, kept)
        return kept, self._facts(seen, kept, rounds=rounds)

    def _how_many(self, wanted: int, kept: int, seen: int) -> int:
        """Prompts of the next round: what is missing, scaled by the share of groups kept so far, times oversampling."""
        most = math.ceil(wanted * self._config.oversampling)
        if seen == 0:
            return most
        expected = -(-(wanted - kept) * seen // max(kept, 1))
        return min(most, math.ceil(expected * self._config.oversampling))

    def _generate(self, count: int, log: StepLog) -> list[Group]:
        """Groups of the next prompts. Responses are graded as they come, while others are still being generated."""
        assert self._engine is not None and self._stream is not None and self._verifier is not None
        verifier = self._verifier
        size = self._config.group_size
        first_draw = self._drawn
        requests: list[SampleRequest] = []
        for prompt in self._stream.take(count):
            seeds = (sample_seed(self._seed, self._drawn, sibling) for sibling in range(size))
            requests.extend(SampleRequest(prompt, seed) for seed in seeds)
            self._drawn += 1
        gradings: dict[int, Verdicts] = {}  # by their first request

        def finished(first: int, rollouts: Sequence[Rollout]) -> None:
            gradings[first] = verifier.submit([self._item(rollout) for rollout in rollouts])

        with log.timed("rollout"):
            rollouts = self._engine.generate(requests, self._sampling, self._progress, finished)
        with log.timed("verify"):
            verdicts = [verdict for first in sorted(gradings) for verdict in gradings[first].result()]
        self._check_verdicts(verdicts)
        return [
            self._group(rollouts[start : start + size], verdicts[start : start + size], first_draw + start // size)
            for start in range(0, len(rollouts), size)
        ]

    def _item(self, rollout: Rollout) -> GradingItem:
        return GradingItem(
            response=self._decode(rollout.response_ids),
            answer=rollout.prompt.answer,
            domain=rollout.prompt.domain,
            truncated=rollout.finish_reason == "length",
            prompt=rollout.prompt.text,
        )

    def _group(self, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict], draw: int) -> Group:
        rewards = (self._noise.reward(verdict.correct, draw, index) for index, verdict in enumerate(verdicts))
        return Group(tuple(rollouts), tuple(verdicts), tuple(rewards))

    def _facts(self, seen: list[Group], kept: list[Group], rounds: int) -> dict[str, Any]:
        rollouts = [rollout for group in seen for rollout in group.rollouts]
        verdicts = [verdict for group in seen for verdict in group.verdicts]
        reasons: dict[str, int] = {}
        for verdict in verdicts:
            reasons[verdict.reason] = reasons.get(verdict.reason, 0) + 1
        return (
            {
                "reward_mean": sum(reward for group in seen for reward in group.rewards) / len(rollouts),
                "groups": len(kept),
                "groups_dropped": len(seen) - len(kept),
                "rounds": rounds,
                "prompts_seen": self._drawn,
                "response_length": sum(len(rollout.response_ids) for rollout in rollouts) / len(rollouts),
                "truncated_share": sum(rollout.finish_reason == "length" for rollout in rollouts) / len(rollouts),
                "tokens_generated": sum(len(rollout.response_ids) for rollout in rollouts),
                "policy_version": min(rollout.policy_version for rollout in rollouts),
                "verifier": dict(sorted(reasons.items())),
            }
            | self._flipped(seen)
            | self._overlong(rollouts)
        )

    def _overlong(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """The reward that overlong responses lose, on average over all; no field where none is punished."""
        if not self._rules.overlong_tokens:
            return {}
        return {"overlong_penalty": sum(self._rules.penalty(len(one.response_ids)) for one in rollouts) / len(rollouts)}

    def _flipped(self, seen: list[Group]) -> dict[str, float]:
        """The share of rewards that contradict their verdict; no field where none is meant to."""
        if not self._noise.probability:
            return {}
        told = [pair for group in seen for pair in zip(group.rewards, group.verdicts, strict=True)]
        return {"rewards_flipped": sum(reward != verdict.correct for reward, verdict in told) / len(told)}
