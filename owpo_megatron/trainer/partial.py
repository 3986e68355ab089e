"""Partial rollouts: a step takes the groups that are complete first; the others are cut and go on in the next step.

    step n      groups 1 2 3 4 5 6 are generated, and 4 are enough: 1 2 4 5 are complete first, 3 and 6 are cut
    step n + 1  3 and 6 go on from their tokens, beside the new groups 7 8 9 10

So a step does not wait for its longest response, and no response is dropped because it is long. The input of what goes
on is the prompt and the tokens so far; ids, log-probs and versions are those of the engine at the moment of sampling.
A group whose first token would be too old for the next step is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from owpo_megatron.config import RolloutConfig
from owpo_megatron.trainer.drawing import OpenGroup, sample_seed
from owpo_megatron.types import (
    CuttingEngine,
    GradingItem,
    Progress,
    Prompt,
    PromptRecord,
    Rollout,
    SampleRequest,
    Sampling,
    StepLog,
    Verdict,
    Verdicts,
    Verifier,
)

CUT = "abort"  # finish reason of a response that was ended for the lack of time


@dataclass(eq=False)
class BegunGroup:
    """A group that is being generated, over one step or several."""

    draw: int  # its number in the run
    prompt: Prompt
    past: PromptRecord | None
    size: int
    responses: dict[int, Rollout] = field(default_factory=dict)  # by sibling; those that were cut, too
    verdicts: dict[int, Verdicts] = field(default_factory=dict)  # of those that are complete
    tokens_before: int = 0  # of earlier steps

    @property
    def missing(self) -> list[int]:
        """Siblings that are not complete."""
        return [one for one in range(self.size) if one not in self.verdicts]

    @property
    def tokens(self) -> int:
        return sum(len(one.response_ids) for one in self.responses.values())

    @property
    def oldest(self) -> int | None:
        """Version of the oldest weights that sampled a token; None: no token yet."""
        return min((version for one in self.responses.values() for version, _ in one.spans), default=None)

    def add(self, sibling: int, drawn: Rollout) -> Rollout:
        """Join what was drawn to what there is of this response."""
        self.responses[sibling] = whole = _joined(self.prompt, self.responses.get(sibling), drawn)
        if not len(whole.response_ids):
            del self.responses[sibling]
        return whole

    def state_dict(self) -> dict[str, Any]:
        """Return what it is begun anew from: its tokens are not kept."""
        return {"draw": self.draw, "prompt": asdict(self.prompt)}

    @classmethod
    def of(cls, state: dict[str, Any], past: Callable[[Prompt], PromptRecord | None], size: int) -> BegunGroup:
        plain = dict(state["prompt"])
        messages = tuple((str(role), str(text)) for role, text in plain["messages"])
        prompt = Prompt(**plain | {"token_ids": tuple(plain["token_ids"]), "messages": messages})
        return cls(state["draw"], prompt, past(prompt), size)


class PartialDrawing:
    """Draws and grades until enough groups are complete. On global rank 0.

    Args:
        seed: the run's seed.
        decode: token ids to text.
        check_verdicts: raises where not one of a round's answers could be graded.
    """

    def __init__(
        self,
        seed: int,
        sampling: Sampling,
        engine: CuttingEngine,
        verifier: Verifier,
        decode: Callable[[Sequence[int]], str],
        check_verdicts: Callable[[Sequence[Verdict]], None],
        progress: Progress | None,
    ):
        self._seed, self._sampling = seed, sampling
        self._engine, self._verifier = engine, verifier
        self._decode, self._check_verdicts = decode, check_verdicts
        self._progress = progress
        self.cut = 0
        """Responses that were cut so far."""
        self.continued = 0
        """Tokens of returned groups that an earlier step had drawn."""

    def draw(
        self, begun: Sequence[BegunGroup], wanted: int, due: Callable[[BegunGroup], bool], log: StepLog
    ) -> list[BegunGroup]:
        """Return so many complete groups, those that are due first, then in the order in which they were begun.

        Args:
            due: a group that must not go on in the next step; all of these are returned, also beyond `wanted`.
        """
        late = [group for group in begun if due(group)]
        asked = [(group, sibling) for group in begun for sibling in group.missing]
        requests = [self._request(group, sibling) for group, sibling in asked]

        def enough() -> bool:
            complete = sum(not group.missing for group in begun)
            return complete >= wanted and not any(group.missing for group in late)

        def finished(first: int, rollouts: Sequence[Rollout]) -> None:
            for (group, sibling), rollout in zip(asked[first:], rollouts, strict=False):
                whole = group.add(sibling, rollout)
                if whole.finish_reason != CUT:
                    group.verdicts[sibling] = self._verifier.submit([GradingItem.of(whole, self._decode)])

        for group in begun:
            group.tokens_before = group.tokens
        with log.timed("rollout"):
            if not enough():
                self._engine.draw_until(requests, self._sampling, enough, self._progress, finished)
        complete = [group for group in begun if not group.missing]
        chosen = late + [group for group in complete if group not in late][: max(wanted - len(late), 0)]
        assert len(chosen) >= wanted, "the engine ended before enough groups were complete"
        self.cut += sum(len(group.missing) for group in begun)
        self.continued += sum(group.tokens_before for group in chosen)
        return sorted(chosen, key=lambda group: group.draw)

    def closed(self, groups: Sequence[BegunGroup], log: StepLog) -> list[OpenGroup]:
        """The groups with their verdicts."""
        with log.timed("verify"):
            verdicts = [[group.verdicts[one].result()[0] for one in range(group.size)] for group in groups]
        self._check_verdicts([verdict for one in verdicts for verdict in one])
        return [
            OpenGroup(group.draw, group.past, group.size, [group.responses[one] for one in range(group.size)], found)
            for group, found in zip(groups, verdicts, strict=True)
        ]

    def _request(self, group: BegunGroup, sibling: int) -> SampleRequest:
        seed, begun = sample_seed(self._seed, group.draw, sibling), group.responses.get(sibling)
        if begun is None:
            return SampleRequest(group.prompt, seed)
        left = replace(self._sampling, max_tokens=self._sampling.max_tokens - len(begun.response_ids))
        return SampleRequest(group.prompt.begun(begun.response_ids), seed, left)


class GroupsUnderWay:
    """The groups that were begun and that no step was given yet, the oldest first.

    A checkpoint has their prompts and numbers alone: after a resume they are begun anew, with the same seeds.

    Args:
        steps: length of the run; nothing is begun beyond the last one.
        take: the next prompts of the stream.
        number: gives the next group its number in the run.
        past: what the run's ledger has of a prompt.
    """

    def __init__(
        self,
        config: RolloutConfig,
        steps: int,
        take: Callable[[int], list[Prompt]],
        number: Callable[[], int],
        past: Callable[[Prompt], PromptRecord | None],
    ):
        self._config, self._steps = config, steps
        self._take, self._number, self._past = take, number, past
        self._groups: list[BegunGroup] = []

    def __len__(self) -> int:
        return len(self._groups)

    def state_dict(self) -> dict[str, Any]:
        return {"begun": [group.state_dict() for group in self._groups]} if self._groups else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        size = self._config.group_size
        self._groups = [BegunGroup.of(one, self._past, size) for one in state.get("begun", ())]

    def take(self, count: int) -> list[Prompt]:
        """The next prompts, those first that were begun already. Without `rollout.surplus` they are begun no more."""
        if self._config.surplus:
            self._begin(count)
            return [group.prompt for group in self._groups[:count]]
        begun, self._groups = self._groups[:count], self._groups[count:]  # by an attempt with surplus
        return [*(group.prompt for group in begun), *self._take(count - len(begun))]

    def first_complete(self, partial: PartialDrawing, wanted: int, step: int, log: StepLog) -> list[OpenGroup]:
        """Generate the wanted groups and the surplus; return those that are complete first."""
        config = self._config
        surplus = 0 if step == self._steps - 1 else math.ceil(config.surplus * config.prompts_per_step)
        self._begin(wanted + surplus)

        def due(group: BegunGroup) -> bool:
            return group.oldest is not None and step + 1 - group.oldest > config.max_staleness

        late = [group for group in self._groups if due(group)]
        rest = [group for group in self._groups if not due(group)]
        chosen = partial.draw(late + rest[: max(wanted + surplus - len(late), 0)], wanted, due, log)
        self._groups = [group for group in self._groups if group not in chosen]
        return partial.closed(chosen, log)

    def _begin(self, count: int) -> None:
        """Have so many groups."""
        for prompt in self._take(max(count - len(self._groups), 0)):
            self._groups.append(BegunGroup(self._number(), prompt, self._past(prompt), self._config.group_size))


def _joined(prompt: Prompt, begun: Rollout | None, drawn: Rollout) -> Rollout:
    """The response to the prompt, out of what an earlier step drew and what was drawn after it."""
    if begun is None:
        return replace(drawn, prompt=prompt)
    if not len(drawn.response_ids):
        return replace(begun, finish_reason=drawn.finish_reason)
    spans: list[tuple[int, int]] = []
    for version, count in begun.spans + drawn.spans:
        if spans and spans[-1][0] == version:
            spans[-1] = version, spans[-1][1] + count
        else:
            spans.append((version, count))
    return replace(
        begun,
        response_ids=begun.response_ids + drawn.response_ids,
        behaviour_logp=begun.behaviour_logp + drawn.behaviour_logp,
        policy_version=drawn.policy_version,
        versions=tuple(spans) if len(spans) > 1 else (),
        finish_reason=drawn.finish_reason,
        verdict=drawn.verdict,
    )
