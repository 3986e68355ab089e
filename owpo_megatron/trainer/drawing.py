"""Carries out what a plan asks for: requests to the engine, verdicts, and the groups that they become."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from owpo_megatron.methods.plan import Ask
from owpo_megatron.trainer.noise import RewardNoise
from owpo_megatron.types import (
    GradingItem,
    Group,
    Progress,
    PromptRecord,
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
    """31 bits that depend on the run, the group's number in the run and the sibling, and on nothing else."""
    digest = hashlib.blake2b(f"{run_seed}/{draw}/{sibling}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


@dataclass
class OpenGroup:
    """A group of the present step, to which a later round may add siblings."""

    draw: int  # its number in the run
    past: PromptRecord | None
    asked: int = 0  # requests so far: each has a seed of its own
    rollouts: list[Rollout] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)

    def closed(self, noise: RewardNoise) -> Group:
        rewards = (noise.reward(verdict.reward, self.draw, index) for index, verdict in enumerate(self.verdicts))
        return Group(tuple(self.rollouts), tuple(self.verdicts), tuple(rewards), self.past)


@dataclass(frozen=True)
class _Place:
    """Place of a response: its group."""

    group: int
    ask: Ask
    given: Rollout | None = None  # None: drawn


class Drawing:
    """Draws and grades the responses that a round of a plan asks for. On global rank 0.

    Args:
        seed: the run's seed.
        sampling: of responses for which the ask names nothing else.
        decode: token ids to text.
        check_verdicts: raises where not one of a round's answers could be graded.
    """

    def __init__(
        self,
        seed: int,
        sampling: Sampling,
        engine: RolloutEngine,
        verifier: Verifier,
        decode: Callable[[Sequence[int]], str],
        check_verdicts: Callable[[Sequence[Verdict]], None],
        progress: Progress | None,
    ):
        self._seed = seed
        self._sampling = sampling
        self._engine = engine
        self._verifier = verifier
        self._decode = decode
        self._check_verdicts = check_verdicts
        self._progress = progress

    def draw(self, asks: Sequence[Ask], groups: list[OpenGroup], log: StepLog) -> None:
        """Add the responses to their groups, in the order of the asks. Each is graded as it comes, while others are
        still being drawn."""
        places = [_Place(_number(ask, groups), ask, given) for ask in asks for given in _responses(ask)]
        requests = [self._request(place, groups) for place in places if place.given is None]
        gradings: dict[int, Verdicts] = {}  # by their first request

        def finished(first: int, rollouts: Sequence[Rollout]) -> None:
            gradings[first] = self._verifier.submit([GradingItem.of(rollout, self._decode) for rollout in rollouts])

        given = [place.given for place in places if place.given is not None]
        ready = self._verifier.submit([GradingItem.of(rollout, self._decode) for rollout in given]) if given else None
        with log.timed("rollout"):
            drawn = self._engine.generate(requests, self._sampling, self._progress, finished) if requests else []
        with log.timed("verify"):
            verdicts = [verdict for first in sorted(gradings) for verdict in gradings[first].result()]
            ready_verdicts = ready.result() if ready else []
        self._check_verdicts([*verdicts, *ready_verdicts])
        new = iter(zip(drawn, verdicts, strict=True))
        old = iter(zip(given, ready_verdicts, strict=True))
        for place in places:
            rollout, verdict = next(new if place.given is None else old)
            _add(groups[place.group], place.ask, rollout, verdict)

    def _request(self, place: _Place, groups: Sequence[OpenGroup]) -> SampleRequest:
        ask, group = place.ask, groups[place.group]
        seed = sample_seed(self._seed, group.draw, group.asked)
        group.asked += 1
        prompt = ask.prompt
        if ask.extends is not None:
            begun = group.rollouts[ask.extends]
            prompt = begun.prompt.begun(begun.response_ids)
        prompt = prompt.begun(ask.prefix)
        sampling = replace(
            self._sampling,
            temperature=self._sampling.temperature if ask.temperature is None else ask.temperature,
            max_tokens=max((ask.max_tokens or self._sampling.max_tokens - prompt.prefix), 1),
        )
        return SampleRequest(prompt, seed, None if sampling == self._sampling else sampling)


def _responses(ask: Ask) -> list[Rollout | None]:
    return [*[None] * ask.siblings, *ask.given]


def _number(ask: Ask, groups: list[OpenGroup]) -> int:
    """Index of the ask's group."""
    assert ask.group is not None and 0 <= ask.group < len(groups), "the collector opens groups before it draws"
    return ask.group


def _add(group: OpenGroup, ask: Ask, rollout: Rollout, verdict: Verdict) -> None:
    if ask.extends is not None:
        begun = group.rollouts[ask.extends]
        versions = begun.spans + rollout.spans
        group.rollouts[ask.extends] = replace(
            begun,
            response_ids=begun.response_ids + rollout.response_ids,
            behaviour_logp=begun.behaviour_logp + rollout.behaviour_logp,
            policy_version=rollout.policy_version,
            versions=versions if len({version for version, _ in versions}) > 1 else (),
            finish_reason=rollout.finish_reason,
            verdict=rollout.verdict,
        )
        group.verdicts[ask.extends] = verdict
        return
    if ask.trained_on is not None and rollout.origin == "policy":
        # the ratio's denominator is the probability under the prompt that the engine saw
        rollout = replace(rollout, trained_ids=ask.trained_on.token_ids, keeps_old=True)
    if ask.origin != "policy":
        rollout = replace(rollout, origin=ask.origin)
    group.rollouts.append(rollout)
    group.verdicts.append(verdict)
