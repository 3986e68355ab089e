"""Partial rollouts: what is cut and continued is what it would have been, nothing is lost, no token is too old.

The engine draws one token per request and tick. Not covered here: real engines (tests/engine/test_cutting.py), and what
staleness does to learning.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from fakes import FakeEngine, FakeVerifier, NoLog, alone, make_collector

from owpo_megatron.config import Config
from owpo_megatron.data import ShuffledStream
from owpo_megatron.engine import RecordedEngine, rollouts_path, save_rollouts
from owpo_megatron.errors import UserError
from owpo_megatron.trainer.partial import GroupsUnderWay, PartialDrawing
from owpo_megatron.types import Group, Prompt, Rollout, RolloutEngine, SampleRequest, Sampling, TokenIds, TokenValues

PROMPTS = [Prompt(f"p/{index}", (3, index), f"problem {index}", "ok") for index in range(40)]
EOS, STEPS, LONGEST = 0, 8, 60


def config(surplus: float = 0.5, staleness: int = 2, method: str = "grpo", **rollout: Any) -> Config:
    sizes = {"prompts_per_step": 4, "group_size": 2, "max_response_tokens": LONGEST}
    return Config.build(
        {
            "model": {"path": "."},
            "data": {"source": "task:cipher"},
            "algorithm": {"name": method, "tis_cap": 2.0},
            "rollout": sizes | {"max_staleness": staleness, "surplus": surplus} | rollout,
            "optimizer": {"steps": STEPS, "updates_per_step": 1},
        }
    )


def whole() -> FakeEngine:
    """Responses of 1 to 60 tokens, by prompt and seed: a few are much longer than the others."""
    return FakeEngine(
        lambda prompt, rng: [rng.randrange(1, 9) for _ in range(int(LONGEST ** rng.random()) - 1)] + [EOS]
    )


class TickingEngine:
    """Draws the responses of `source`, one token per request and tick; the version may rise between two ticks.

    Args:
        rises: a tick after which the weights are pushed, in each draw; None: between draws alone.
    """

    def __init__(self, source: RolloutEngine, rises: int | None = None):
        self.source, self.rises = source, rises
        self.version = 0
        self.ticks = 0

    def weight_versions(self) -> list[int]:
        return [self.version]

    def draw_until(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        enough: Callable[[], bool],
        progress: Any = None,
        finished: Any = None,
    ) -> list[Rollout]:
        left, drawn = [self._left(request, sampling) for request in requests], [0] * len(requests)
        marks: list[list[tuple[int, int]]] = [[] for _ in requests]
        open_ = list(range(len(requests)))
        answers: dict[int, Rollout] = {}
        tick = 0
        while open_ and not enough():
            if tick == self.rises:
                self.version += 1
            tick += 1
            self.ticks += 1
            for index in list(open_):
                drawn[index] += 1
                if marks[index] and marks[index][-1][0] == self.version:
                    marks[index][-1] = self.version, marks[index][-1][1] + 1
                else:
                    marks[index].append((self.version, 1))
                if drawn[index] == len(left[index].response_ids):
                    open_.remove(index)
                    answers[index] = self._cut(left[index], drawn[index], marks[index])
                    finished(index, [answers[index]])
        for index in open_:
            answers[index] = replace(self._cut(left[index], drawn[index], marks[index]), finish_reason="abort")
            finished(index, [answers[index]])
        return [answers[index] for index in range(len(requests))]

    def _left(self, request: SampleRequest, sampling: Sampling) -> Rollout:
        """Return the source's response after the tokens that the prompt brings along, which must be its own."""
        prompt = request.prompt
        ids, begun = prompt.token_ids, prompt.token_ids[len(prompt.token_ids) - prompt.prefix :]
        bare = replace(prompt, token_ids=ids[: len(ids) - prompt.prefix], prefix=0)
        full = self.source.generate([SampleRequest(bare, request.seed)], sampling)[0]
        assert tuple(full.response_ids[: len(begun)]) == tuple(begun), "it goes on from its own tokens"
        assert (request.sampling or sampling).max_tokens == LONGEST - len(begun)
        after = {"response_ids": full.response_ids[len(begun) :], "behaviour_logp": full.behaviour_logp[len(begun) :]}
        return replace(full, prompt=prompt, **after)

    @staticmethod
    def _cut(full: Rollout, count: int, marks: list[tuple[int, int]]) -> Rollout:
        ids, logps = TokenIds(full.response_ids[:count]), TokenValues(full.behaviour_logp[:count])
        last = marks[-1][0] if marks else -1
        versions = tuple(marks) if len(marks) > 1 else ()
        return replace(full, response_ids=ids, behaviour_logp=logps, policy_version=last, versions=versions)


class Run:
    """Steps of a collector, each followed by a push."""

    def __init__(self, settings: Config, engine: TickingEngine, verifier: Any = None):
        self.engine = engine
        self.seen: list[list[Group]] = []
        self.lines: list[dict[str, Any]] = []
        stream = ShuffledStream(PROMPTS, settings.seed)

        def record(step: int, seen: Sequence[Group], kept: Sequence[Group]) -> None:
            self.seen.append(list(seen))

        verifier = verifier or FakeVerifier({"right": "ok"})
        parts = (alone(), engine, verifier, stream, lambda ids: "right" if len(ids) % 2 else "wrong", (EOS,), record)
        self.collector = make_collector(settings, *parts)

    def steps(self, steps: range) -> Run:
        for step in steps:
            log = NoLog()
            self.collector.collect(step, log)
            self.lines.append(log.values)
            self.engine.version = max(self.engine.version, step + 1)
        return self

    def rollouts(self) -> list[Rollout]:
        return [rollout for groups in self.seen for group in groups for rollout in group.rollouts]


def same_as_uncut(rollouts: Sequence[Rollout], source: RolloutEngine) -> None:
    for rollout in rollouts:
        full = source.generate([SampleRequest(rollout.prompt, rollout.seed)], Sampling(LONGEST, stop_token_ids=(EOS,)))[
            0
        ]
        assert rollout.prompt == full.prompt and rollout.finish_reason == full.finish_reason != "abort"
        assert tuple(rollout.response_ids) == tuple(full.response_ids)
        assert tuple(rollout.behaviour_logp) == tuple(full.behaviour_logp)
        assert sum(count for _, count in rollout.spans) == len(full.response_ids)
        assert [version for version, _ in rollout.spans] == sorted({version for version, _ in rollout.spans})


@pytest.mark.parametrize("rises", [None, 4])
@pytest.mark.parametrize("staleness", [2, 3])
def test_continued_responses_are_what_they_would_have_been(staleness: int, rises: int | None) -> None:
    """Ids, log-probs and ends, over cuts and pushes; each token has the version that sampled it, within the bound."""
    source = whole()
    run = Run(config(staleness=staleness), TickingEngine(source, rises if staleness == 3 else None)).steps(range(STEPS))
    assert all(len(groups) == 4 for groups in run.seen)
    same_as_uncut(run.rollouts(), source)
    assert any(len(rollout.spans) > 1 for rollout in run.rollouts())
    assert max(line["staleness"]["max"] for line in run.lines) <= staleness
    assert sum(line["partial"]["cut"] for line in run.lines) > 0
    assert 0 < max(line["partial"]["continued"] for line in run.lines) < 1


def test_no_group_is_lost_and_none_is_trained_twice() -> None:
    """Numbers of the draws: those trained on and those under way are all that were begun. At the end none is begun in
    vain."""
    run = Run(config(), TickingEngine(whole())).steps(range(STEPS))
    ids = [group.rollouts[0].prompt.id for groups in run.seen for group in groups]
    assert len(ids) == len(set(ids)) == 4 * STEPS
    assert set(ids) == {prompt.id for prompt in ShuffledStream(PROMPTS, config().seed).take(4 * STEPS)}
    assert run.lines[-1]["partial"]["groups"] == 0 < run.lines[-2]["partial"]["groups"]


def test_a_step_does_not_wait_for_its_longest_response() -> None:
    """Tokens that the engine draws one after the other, for as many responses."""
    source = whole()
    engine = TickingEngine(source)
    Run(config(), engine).steps(range(STEPS))
    in_turns = Run(config(0.0, 0), source).steps(range(STEPS))  # type: ignore[arg-type]
    longest = [max(len(one.response_ids) for group in groups for one in group.rollouts) for groups in in_turns.seen]
    assert engine.ticks < 0.8 * sum(longest)


def test_what_would_be_too_old_in_the_next_step_is_waited_for() -> None:
    """Groups 1 and 3 are much longer than the others, and weights stay as they are: with bound 2 they are cut in the
    steps 0 and 1, and complete in step 2."""
    settings = config(surplus=1.0)

    def respond(prompt: Prompt, rng: Any) -> list[int]:
        return [1] * (LONGEST - 1 if prompt.id in ("p/1", "p/3") else 1) + [EOS]

    engine, stream, numbers = TickingEngine(FakeEngine(respond)), iter(PROMPTS), itertools.count()
    take = lambda count: list(itertools.islice(stream, count))  # noqa: E731
    groups = GroupsUnderWay(settings.rollout, STEPS, take, lambda: next(numbers), lambda prompt: None)
    verifier = FakeVerifier({"right": "ok"})
    sampling = Sampling(LONGEST, stop_token_ids=(EOS,))
    found, cut = [], []
    for step in range(3):
        drawing = PartialDrawing(1, sampling, engine, verifier, lambda ids: "right", lambda verdicts: None, None)
        found.append([group.draw for group in groups.first_complete(drawing, 4, step, NoLog())])
        cut.append(drawing.cut)
    assert found == [[0, 2, 4, 5], [6, 7, 8, 9], [1, 3, 10, 11]] and cut[0] == cut[1] == 4


def test_over_recorded_rollouts(tmp_path: Any) -> None:
    """The same from files of a run's rollouts: what is trained on are the recorded responses, bit for bit."""
    settings, source = config(), whole()
    first = Run(settings, TickingEngine(source)).steps(range(STEPS))
    for step, groups in enumerate(first.seen):
        save_rollouts(rollouts_path(tmp_path, step + 1), [one for group in groups for one in group.rollouts])
    recorded = RecordedEngine(tmp_path)
    again = Run(settings, TickingEngine(recorded)).steps(range(STEPS))
    same_as_uncut(again.rollouts(), recorded)
    assert len(again.rollouts()) == len(first.rollouts())


def test_a_resumed_run_begins_anew_what_was_under_way() -> None:
    source = whole()
    straight = Run(config(), TickingEngine(source)).steps(range(4))
    state = json.loads(json.dumps(straight.collector.state_dict()))
    assert state["begun"] and "response_ids" not in json.dumps(state)
    for surplus, staleness in ((0.5, 2), (0.0, 0)):
        engine: Any = TickingEngine(source) if surplus else source
        engine.version = 4
        resumed = Run(config(surplus, staleness), engine)
        resumed.collector.load_state_dict(state)
        assert json.loads(json.dumps(resumed.collector.state_dict())) == state
        resumed.steps(range(4, STEPS))
        trained = [
            group.rollouts[0].prompt.id for run in (straight, resumed) for groups in run.seen for group in groups
        ]
        assert len(trained) == len(set(trained)) == 4 * STEPS
        assert {one["prompt"]["id"] for one in state["begun"]} <= set(trained)
        same_as_uncut(resumed.rollouts(), source)


def test_dynamic_sampling_gets_its_mixed_groups() -> None:
    source = whole()
    run = Run(config(method="dapo", max_rounds=20), TickingEngine(source)).steps(range(3))
    assert [line["groups"] for line in run.lines] == [4, 4, 4]
    same_as_uncut(run.rollouts(), source)


@pytest.mark.parametrize(
    "changes",
    [{"staleness": 1}, {"stop": ["Question:"]}, {"replay": "rollouts"}, {"plan": "dars"}],
)
def test_what_cannot_be_cut_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"rollout\.surplus = 0\.5: "):
        config(**changes)


def test_an_engine_that_cannot_cut_is_refused() -> None:
    with pytest.raises(UserError, match=r"rollout\.surplus = 0\.5: the engine of this run cannot cut"):
        Run(config(), whole()).steps(range(1))  # type: ignore[arg-type]
