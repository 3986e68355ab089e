"""Trainer and engines that have memory in turn: who releases what before whom, and what a dead engine changes.

A server that records stands for the engines, the real client, fleet, sync and rank 0's part for the run. Not covered:
that memory is free afterwards, which needs a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakePolicy
from recording_server import RecordingServer
from tiny import build_policy, make_config, make_hf_model, random_samples

from owpo_megatron.config import EngineConfig, SyncConfig
from owpo_megatron.engine import EngineTurns, Fleet, UrlEngine
from owpo_megatron.engine.command import server_raw
from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.methods import make_method
from owpo_megatron.policy import SlotReference
from owpo_megatron.sync import make_sync
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.trainer.turns import RolloutsInTurn, SyncInTurn, Turns

RELEASED = "release_memory_occupation kv_cache"
PUSH = [
    "resume_memory_occupation weights", "pause_generation", "flush_cache", "update_weight_version -1",
    "begin_weight_update", "update_weights_from_tensor", "end_weight_update", "update_weight_version 1",
    "continue_generation",
]  # fmt: skip


class Resting(FakePolicy):
    """Notes when it rests and when it wakes, among the server's calls."""

    resting = False

    def rest(self) -> None:
        self.resting = True
        self.events.append("policy rests")

    def update(self, samples: Any, method: Any) -> dict[str, Any]:
        self.resting = False
        return super().update(samples, method)


class Run:
    """Parts of a run with one server; `collect` and `evaluate` stand for what draws."""

    def __init__(self, server: RecordingServer, **engine: Any):
        self.server, self.policy = server, Resting(server.calls)
        config = EngineConfig(urls=[server.url], startup_timeout=1.0, **engine)
        self.fleet = Fleet([UrlEngine(server.url, config)], config)
        self.turns = Turns(self.policy, lambda: server.calls.append("barrier"), EngineTurns(self.fleet))
        self.fleet.take_cache = self.turns.take_cache
        sync = SyncInTurn(make_sync(SyncConfig(), self.fleet.clients, Path("unused")), self.turns)
        revive = self.fleet.revive
        self.main = MainRank(lambda value: value, self.policy.named_weights, sync, revive, turns=self.turns)
        self.fleet.on_restart = self.main.push_again
        self.rollouts = RolloutsInTurn(self, self.turns)

    def collect(self, step: int, log: Any) -> list[Any]:
        self.main.run(self._draw)
        return []

    def evaluate(self) -> None:
        self.main.run(self._draw)

    def _draw(self) -> None:
        self.fleet.take_cache()
        self.server.calls.append("draw")

    def calls(self) -> list[str]:
        """Those since the last time."""
        found = [call for call in self.server.calls if call not in ("model_info", "server_info")]
        self.server.calls.clear()
        return found


@pytest.fixture
def server() -> Iterator[RecordingServer]:
    server = RecordingServer()
    yield server
    server.close()


def test_a_step(server: RecordingServer) -> None:
    """Everything that one side releases comes before what the other one takes."""
    run = Run(server)
    run.main.push(0)
    run.calls()
    run.rollouts.collect(0, None)  # type: ignore[arg-type]
    assert run.calls() == [
        "continue_generation", "draw",  # engines have had their caches since they were started
        "pause_generation", "flush_cache", "update_weight_version -1", f"{RELEASED} weights",
    ]  # fmt: skip
    run.policy.update([], None)
    run.calls()
    run.main.push(1)
    assert run.calls() == ["policy rests", "barrier", *PUSH]
    run.evaluate()
    taken = ["resume_memory_occupation kv_cache", "continue_generation", "draw"]
    assert run.calls() == [*taken, "pause_generation", "flush_cache", RELEASED]
    run.rollouts.collect(1, None)  # type: ignore[arg-type]
    assert run.calls()[: len(taken)] == taken
    assert server.updates[0] != [] and len(server.updates) == 2


def test_an_engine_that_dies_while_the_policy_trains_is_not_asked_for_what_it_never_released(
    server: RecordingServer,
) -> None:
    """The push finds it, waits until it answers again, and brings the weights; a second time, it releases again."""
    run = Run(server)
    run.main.push(0)
    run.rollouts.collect(0, None)  # type: ignore[arg-type]
    run.policy.update([], None)
    run.calls()
    server.refuse["resume_memory_occupation"] = [500]
    run.main.push(1)
    assert run.fleet.restarts == 1
    calls = run.calls()
    assert calls[:3] == ["policy rests", "barrier", "resume_memory_occupation 500"]
    assert calls[3:] == PUSH[1:], "it has its memory: only the push is left"
    run.rollouts.collect(1, None)  # type: ignore[arg-type]
    assert run.calls()[-1] == f"{RELEASED} weights"


def test_an_engine_that_dies_at_the_release_gets_the_weights_and_releases(server: RecordingServer) -> None:
    run = Run(server)
    run.main.push(1)
    run.calls()
    server.refuse["release_memory_occupation"] = [500]
    run.rollouts.collect(0, None)  # type: ignore[arg-type]
    calls = run.calls()
    failed = calls.index("release_memory_occupation 500")
    assert calls[failed + 1 : failed + len(PUSH)] == PUSH[1:]
    assert calls[-1] == f"{RELEASED} weights"


def test_an_engine_that_stays_dead_ends_the_run_by_name(server: RecordingServer) -> None:
    run = Run(server, max_restarts=0)
    run.main.push(0)
    server.refuse["release_memory_occupation"] = [500]
    with pytest.raises(EngineError, match=r"engine 0 was lost again after 0 restarts .*release_memory_occupation"):
        run.rollouts.collect(0, None)  # type: ignore[arg-type]


def test_what_still_runs_is_not_released(server: RecordingServer) -> None:
    """SGLang's release ends a server that is not idle; its flush refuses instead."""
    run = Run(server)
    run.main.push(0)
    run.calls()
    server.refuse["flush_cache"] = [400]
    with pytest.raises(EngineError, match="flush_cache refused with 400"):
        run.rollouts.collect(0, None)  # type: ignore[arg-type]
    assert not any("release" in call for call in run.calls())


def test_a_server_without_the_memory_saver_is_refused(server: RecordingServer) -> None:
    server.saves_memory = False
    with pytest.raises(UserError, match=r"engine.in_turn = True: .*without enable_memory_saver"):
        Run(server)


def test_a_run_starts_its_servers_with_the_memory_saver(tmp_path: Path) -> None:
    config = make_config(tmp_path, engine={"in_turn": True})
    assert server_raw(config)["enable_memory_saver"] is True and "enable_memory_saver" not in server_raw(
        make_config(tmp_path)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_with_the_same_bits_after_a_rest(dtype: str, tmp_path: Path) -> None:
    """Moments and masters come back; gradients are made anew. What rests has no memory on the device."""
    model = make_hf_model(tmp_path / "model", num_hidden_layers=2)
    weights = []
    for rests in (False, True):
        policy = build_policy(make_config(model, model={"dtype": dtype}))
        for seed in range(3):
            policy.update(random_samples(seed, logps=False), make_method("grpo"))
            if rests:
                policy.rest()
                gradients = [buffer.grad_data for chunk in policy._chunks for buffer in chunk.buffers]
                assert policy.resting and all(one.untyped_storage().nbytes() == 0 for one in gradients)
                away = policy._memory.state.bytes_away
                elements = sum(param.numel() for param in policy._chunks[0].parameters())
                assert away == (8 if dtype == "float32" else 12) * elements
                assert len(list(policy.named_weights())) > 20 and policy.resting, "weights can be pushed meanwhile"
        weights.append([tensor.clone() for _, tensor in policy.named_weights()])
        assert not rests or policy.resting
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.process
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("in_turn", [False, True])
def test_an_offloaded_optimizer_makes_the_same_steps(dtype: str, in_turn: bool, tmp_path: Path) -> None:
    """Its state is away in every pass, and whole in a checkpoint; swaps and a fresh start go on with the same bits."""
    model = make_hf_model(tmp_path / "model", num_hidden_layers=2)
    found = []
    for offload in (False, True):
        config = make_config(model, model={"dtype": dtype}, optimizer={"offload": offload})
        policy, state = build_policy(config), tmp_path / f"state_{offload}"
        elements = sum(param.numel() for param in policy._chunks[0].parameters())
        all_of_it = (8 if dtype == "float32" else 12) * elements

        def away(policy: Any = policy, expected: int = all_of_it if offload else 0) -> None:
            if not policy.resting:
                assert policy._memory.state.bytes_away == expected

        for seed in range(3):
            policy.update(random_samples(seed, logps=False), make_method("grpo"))
            away()
            if in_turn:
                policy.rest()
            if seed == 1:
                SlotReference(policy).swap(2, "scheduled")
                state.mkdir()
                policy.save(state)
                away()
        ends = [policy.weights_digest()]
        policy.restore(state, reference_is_policy=True)
        away()
        policy.update(random_samples(5, logps=False), make_method("grpo"))
        policy.restart_optimizer()
        policy.update(random_samples(6, logps=False), make_method("grpo"))
        found.append([*ends, policy.weights_digest()])
    assert found[0] == found[1]
