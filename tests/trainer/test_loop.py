"""The loop's verbs in Algorithm 1's order, and rank 0's work with threads as ranks."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakePolicy, FakeReference, FakeSync, NoLog, make_batches
from tiny import make_config

from owpo_megatron.config import EvalConfig
from owpo_megatron.errors import EngineError
from owpo_megatron.methods import make_method
from owpo_megatron.trainer.loop import Loop
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.trainer.schedule import Schedule, StagePlan
from owpo_megatron.types import Group, Prompt, Rollout, Verdict

MIXED = Group(
    tuple(Rollout(Prompt("p", (5,), "", ""), (3, 2), (-0.1, -0.2), 0, "stop", seed) for seed in range(2)),
    (Verdict(True, "ok"), Verdict(False, "wrong")),
    (1.0, 0.0),
)


class CheckpointsAfter1And3(Schedule):
    def checkpoint_due(self, done: int) -> bool:
        return done in (1, 3)


class Recording:
    """A loop of three steps with a swap every two, two updates per step, whose parts record their calls."""

    def __init__(self, start: int = 0, groups: int = 2, stop_before: int = 99):
        self.events: list[str] = []
        self.policy = FakePolicy(self.events)
        self.reference = FakeReference(self.policy)
        config = make_config(
            Path("m"), rollout={"prompts_per_step": 2, "group_size": 2}, reference={"every": 2},
            optimizer={"steps": 3, "updates_per_step": 2},
        )  # fmt: skip
        note = self.events.append

        class Collector:
            def collect(self, step: int, log: Any) -> list[Group]:
                note(f"collect {step}")
                return [MIXED] * groups

        class Log(NoLog):
            def __enter__(self) -> Log:
                return self

            def __exit__(self, *error: object) -> None:
                note("line")

        class Record:
            def restore(self) -> int:
                return start

            def save(self, done: int) -> None:
                note(f"save {done}")

            def settle(self) -> None:
                note("settle")

            def evaluate(self, done: int) -> None:
                note(f"evaluate {done}")

            def step(self, step: int) -> Log:
                return Log()

            def stop_requested(self) -> bool:
                return len([event for event in events if event == "line"]) >= stop_before

        class Engines:
            def push(self, version: int) -> None:
                note(f"push {version}")

        events = self.events
        method, stages = make_method("owpo"), StagePlan.of(config.reference, config.optimizer.steps)
        self.loop = Loop(
            CheckpointsAfter1And3(stages, EvalConfig(before=True, after=True)),
            self.policy,
            method,
            Collector(),
            make_batches(config, stages, method, self.policy, self.reference),
            self.reference,
            Engines(),
            Record(),
        )


def test_verbs_come_in_the_order_of_algorithm_1() -> None:
    """Step 1 starts with the reference being the policy; the swap after step 2 comes after its updates; the reference's
    pass of step 2 is spent, that of step 3 is not. An evaluation sees the pushed weights, comes before a swap, which
    may choose by it, and before the checkpoint, which remembers it."""
    recording = Recording()
    assert recording.loop.run() == 3
    two_old, two_updates = ["policy.logprobs 2"] * 2, ["update 2"] * 2
    assert recording.events == [
        "push 0", "evaluate 0",
        "collect 0", *two_old, *two_updates, "push 1", "save 1", "line",
        "collect 1", *two_old, "reference.logprobs 1", "reference.logprobs 1", *two_updates, "push 2", "swap 2", "line",
        "collect 2", *two_old, *two_updates, "push 3", "evaluate 3", "save 3", "line",
        "settle",
    ]  # fmt: skip


def test_a_resumed_run_pushes_the_restored_weights_first() -> None:
    recording = Recording(start=2)
    recording.loop.run()
    assert recording.events[:2] == ["push 2", "collect 2"]


def test_a_stop_saves_the_step_that_was_finished() -> None:
    recording = Recording(stop_before=2)
    assert recording.loop.run() == 2
    assert recording.events[-4:] == ["swap 2", "line", "save 2", "settle"]


def test_a_stop_right_after_a_checkpoint_does_not_save_twice() -> None:
    recording = Recording(stop_before=1)
    assert recording.loop.run() == 1
    assert recording.events.count("save 1") == 1


def test_a_finished_run_started_again_does_nothing_new() -> None:
    recording = Recording(start=3)
    assert recording.loop.run() == 3
    assert recording.events == ["push 3", "settle"]


def test_a_step_without_groups_updates_nothing_and_the_run_goes_on() -> None:
    recording = Recording(groups=0)
    assert recording.loop.run() == 3
    assert recording.policy.updates == [] and recording.events.count("line") == 3
    assert "swap 2" in recording.events


class Ranks:
    """Threads as ranks: rank 0's object goes to all through queues, and every rank must take part in the weights."""

    def __init__(self, count: int = 3):
        self.count = count
        self._boxes = [queue.Queue[Any]() for _ in range(count)]
        self._together = threading.Barrier(count, timeout=5)
        self.walked = [0] * count

    def broadcast(self, rank: int) -> Callable[[Any], Any]:
        def give(value: Any) -> Any:
            if rank == 0:
                for box in self._boxes[1:]:
                    box.put(value)
                return value
            return self._boxes[rank].get(timeout=5)

        return give

    def weights(self, rank: int) -> Callable[[], Iterator[tuple[str, torch.Tensor]]]:
        def walk() -> Iterator[tuple[str, torch.Tensor]]:
            for name in ("a", "b", "c"):
                self._together.wait()  # as a collective: waits unless all ranks come
                if rank == 0:
                    yield name, torch.zeros(1)
            self.walked[rank] += 1

        return walk

    def run(
        self, work: Callable[[int, MainRank], Any], sync: Any, revive: Callable[[Exception], int] = lambda error: 0
    ) -> list[Any]:
        results: list[Any] = [None] * self.count
        self.main = MainRank(self.broadcast(0), self.weights(0), sync, revive)

        def one(rank: int) -> None:
            main = MainRank(self.broadcast(rank), self.weights(rank), None, revive) if rank else self.main
            try:
                results[rank] = work(rank, main)
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=20)
        return results


def test_every_rank_gets_rank_0s_result() -> None:
    def work(rank: int, main: MainRank) -> Any:
        return main.run(lambda: ("of rank", rank))

    assert Ranks().run(work, FakeSync()) == [("of rank", 0)] * 3


def test_rank_0_can_have_the_weights_pushed_in_the_middle_of_its_work() -> None:
    ranks, sync = Ranks(), FakeSync()

    def generate_while_an_engine_dies_twice() -> str:
        ranks.main.push_again()
        ranks.main.push_again()
        return "rollouts"

    def work(rank: int, main: MainRank) -> Any:
        main.push(7)
        return main.run(generate_while_an_engine_dies_twice)

    assert ranks.run(work, sync) == ["rollouts"] * 3
    assert ranks.walked == [3, 3, 3]
    assert [(version, list(weights)) for version, weights in sync.pushed] == [(7, ["a", "b", "c"])] * 3


class BreakingSync(FakeSync):
    """Loses its engine after one tensor, so many times."""

    def __init__(self, times: int):
        super().__init__()
        self.times = times

    def push(self, weights: Any, version: int) -> None:
        if self.times:
            self.times -= 1
            next(iter(weights))
            raise EngineError("engine 0 is gone")
        super().push(weights, version)


@pytest.mark.parametrize("revived", [True, False])
def test_an_engine_lost_during_a_push_leaves_no_rank_behind(revived: bool) -> None:
    """The other ranks are in the middle of the weights. A revived engine got them in `revive`; else push again."""
    ranks, sync = Ranks(), BreakingSync(times=1)

    def revive(error: Exception) -> int:
        if revived:
            ranks.main.push_again()
        return int(revived)

    def work(rank: int, main: MainRank) -> Any:
        main.push(4)
        return main.run(lambda: "next")

    assert ranks.run(work, sync, revive) == ["next"] * 3
    assert [version for version, _ in sync.pushed] == [4] and ranks.walked == [2, 2, 2]


def test_an_engine_lost_for_good_is_an_error_on_rank_0() -> None:
    """The others wait for rank 0, whose end takes the job down (tests/e2e)."""
    ranks = Ranks(count=1)
    (error,) = ranks.run(lambda rank, main: main.push(4), BreakingSync(times=2))
    assert isinstance(error, EngineError)
