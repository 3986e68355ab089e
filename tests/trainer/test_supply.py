"""Steps drawn ahead of their updates: the bound, the order, a resume, lost engines.

Not covered: real engines that get weights in the middle of a response (tests/engine), and what staleness does to
learning.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from fakes import FakeEngine, FakeVerifier, NoLog, alone, make_collector

from owpo_megatron.config import Config
from owpo_megatron.data import ShuffledStream
from owpo_megatron.errors import RunError, UserError
from owpo_megatron.methods import TokenStatistics
from owpo_megatron.trainer.supply import Supply, WeightsNeeded, pushed_by_this_thread
from owpo_megatron.types import Group, Prompt, Rollout

PROMPTS = [Prompt(f"p/{index}", (3, index), f"problem {index}", "ok") for index in range(24)]
EOS = 0


def config(staleness: int, steps: int = 6) -> Config:
    return Config.build(
        {
            "model": {"path": "."},
            "data": {"source": "task:cipher"},
            "algorithm": {"name": "grpo", "tis_cap": 2.0},
            "rollout": {"prompts_per_step": 2, "group_size": 2, "max_staleness": staleness, "max_response_tokens": 8},
            "optimizer": {"steps": steps, "updates_per_step": 1},
        }
    )


class Engine(FakeEngine):
    """Stamps its version at the moment of the draw; may fail once, as one that was restarted does."""

    def __init__(self) -> None:
        super().__init__(lambda prompt, rng: [rng.randrange(1, 9), EOS])
        self.loses: set[int] = set()  # numbers of calls

    def generate(self, *given: Any, **options: Any) -> list[Rollout]:
        if len(self.calls) in self.loses:
            self.loses.discard(len(self.calls))
            raise WeightsNeeded("restarted")
        return super().generate(*given, **options)


def collector(settings: Config, engine: Engine, recorded: Callable[..., None] | None = None, **more: Any) -> Any:
    def record(step: int, seen: Sequence[Group], kept: Sequence[Group]) -> None:
        pass

    stream = ShuffledStream(PROMPTS, settings.seed)
    verifier = FakeVerifier({"right": "ok"})
    return make_collector(
        settings, alone(), engine, verifier, stream, lambda ids: "right", (EOS,), recorded or record, **more
    )


def trained(parts: tuple[Any, Engine], steps: range) -> list[list[tuple[str, int]]]:
    """Return what these steps train on, each followed by a push."""
    found = []
    for step in steps:
        found.append(keys(parts[0].collect(step, NoLog())))
        parts[1].version = step + 1
    return found


def make(bound: int, version: int = 0, **more: Any) -> tuple[Any, Engine]:
    engine = Engine()
    engine.version = version
    return collector(config(bound), engine, **more), engine


def keys(groups: Sequence[Group]) -> list[tuple[str, int]]:
    return [(rollout.prompt.id, rollout.seed) for group in groups for rollout in group.rollouts]


@pytest.mark.parametrize("bound", [1, 2])
def test_steps_ask_for_the_same_and_no_token_is_older_than_the_bound(bound: int) -> None:
    """Prompts and seeds do not depend on when they are drawn; versions are those of the draw."""
    together = collector(config(0), Engine())
    expected = [keys(together.collect(step, NoLog())) for step in range(6)]
    engine = Engine()
    ahead = collector(config(bound), engine)
    found, oldest = [], []
    for step in range(6):
        log = NoLog()
        found.append(keys(ahead.collect(step, log)))
        oldest.append(log.values["staleness"]["max"])
        assert 0 <= log.values["staleness"]["mean"] <= log.values["staleness"]["max"] <= bound
        assert log.values["generation_seconds"] >= 0 and log.phases == ["rollout"]
        engine.version = step + 1  # the push
    assert found == expected and len(engine.calls) == 6, "nothing is drawn beyond the last step"


def test_the_next_step_is_drawn_while_this_one_trains() -> None:
    engine, drawn = Engine(), threading.Event()
    respond = engine._respond

    def noted(prompt: Prompt, rng: Any) -> Sequence[int]:
        if len(engine.calls) == 2:
            drawn.set()
        return respond(prompt, rng)

    engine._respond = noted
    ahead = collector(config(1), engine)
    ahead.collect(0, NoLog())
    assert drawn.wait(30), "step 2 is drawn though nobody has asked for it yet"
    engine.version = 1
    log = NoLog()
    ahead.collect(1, log)
    assert log.values["staleness"] == {"mean": 1.0, "max": 1}


def test_what_was_drawn_ahead_is_drawn_again_after_a_resume() -> None:
    straight = make(2)
    trained(straight, range(3))
    state = json.loads(json.dumps(straight[0].state_dict()))
    expected = trained(straight, range(3, 6))
    for bound in (2, 1, 0):  # a run may be resumed with another bound
        resumed = make(bound, version=3)
        resumed[0].load_state_dict(state)
        assert json.loads(json.dumps(resumed[0].state_dict())) == state
        assert trained(resumed, range(3, 6)) == expected


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_a_lost_engine_gets_its_weights_and_the_step_is_drawn_again(lost: int) -> None:
    recovered: list[int] = []
    ahead = make(2, recover=lambda: recovered.append(threading.get_ident()))
    ahead[1].loses = {lost}
    assert trained(ahead, range(6)) == trained(make(2), range(6))
    assert recovered == [threading.get_ident()], "the push is collective: the thread that all ranks know makes it"


def test_other_errors_end_the_step_that_they_belong_to() -> None:
    def draw(step: int) -> int:
        if step == 2:
            raise RunError("no disk")
        return step

    supply = Supply(draw, dict, lambda state: None, lambda: None, bound=2, steps=5)
    assert [supply.take(0), supply.take(1)] == [0, 1]
    with pytest.raises(RunError, match="no disk"):
        supply.take(2)


def test_only_the_thread_that_drives_the_ranks_pushes() -> None:
    pushed: list[bool] = []
    guarded, raised = pushed_by_this_thread(lambda: pushed.append(True)), []

    def elsewhere() -> None:
        try:
            guarded()
        except WeightsNeeded:
            raised.append(True)

    guarded()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert pushed == [True] and raised == [True]


def test_tokens_beyond_the_bound_end_the_run() -> None:
    """Recorded rollouts of a run with a larger bound have such."""
    engine = Engine()
    engine.version = -3
    ahead = collector(config(1), engine)
    with pytest.raises(RunError, match=r"step 1 got tokens of weights 3 steps old \(rollout.max_staleness\)"):
        ahead.collect(0, NoLog())


def test_plans_that_look_at_the_policy_take_turns() -> None:
    ahead = collector(config(1), Engine())
    rollout = Rollout(PROMPTS[0], (1,), (-0.5,), 0, "stop", 1)
    with pytest.raises(UserError, match=r"rollout.max_staleness = 1: grpo looks at the policy.*set 0"):
        found: list[TokenStatistics] = ahead._statistics([rollout])
        assert not found


def test_tokens_of_older_weights_need_the_correction() -> None:
    with pytest.raises(UserError, match=r"rollout.max_staleness = 1: .*set algorithm.tis_cap"):
        Config.build({"model": {"path": "."}, "data": {"source": "task:cipher"}, "rollout": {"max_staleness": 1}})
