"""The simulation under a virtual clock: engines, clock and costs by hand, what must hold of whole simulations.

That its seconds are those of real GPUs is not shown: docs/scale.md has the errors against published step times.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recipe_models import SHAPES
from tiny import make_config
from typer.testing import CliRunner

from owpo_megatron.cli.main import app
from owpo_megatron.config import Config
from owpo_megatron.engine.recorded import rollouts_path, save_rollouts
from owpo_megatron.errors import RunError, UserError
from owpo_megatron.families import HFModel, read_hf_config
from owpo_megatron.plan.lengths import lengths_of
from owpo_megatron.plan.machine import Machine
from owpo_megatron.plan.published import MFU, ROWS, Fitted, Row, as_published, fit, simulate_row
from owpo_megatron.plan.simulate import Clock, Cluster, Simulated, simulate
from owpo_megatron.plan.trainer_cost import TrainerCost
from owpo_megatron.plan.virtual_engines import DecodingCost, VirtualEngine, generate, generate_on
from owpo_megatron.trainer.supply import staleness
from owpo_megatron.types import Prompt, Rollout

A_SECOND_A_TOKEN = DecodingCost(1.0, 0.0, 0.0, 0.0, bandwidth=1.0, peak=1.0, tokens=10**6)
SPEC = "lognormal:300,1.0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-8b-base"]))
    return tmp_path


@pytest.fixture
def model(folder: Path) -> HFModel:
    return read_hf_config(folder)


def sized(folder: Path, **sections: Any) -> Config:
    fields: dict[str, Any] = {
        "model": {"dtype": "bfloat16"},
        "parallel": {"tp": 4, "sp": True},
        "algorithm": {"name": "dapo"},
        "rollout": {"prompts_per_step": 32, "group_size": 8, "max_response_tokens": 4096},
        "optimizer": {"updates_per_step": 2, "tokens_per_microbatch": 8192},
    }
    return make_config(folder, **(fields | sections))


# ------------------------------------------------------------------------------------------------ engines
def test_a_batch_ends_one_by_one() -> None:
    """Three tokens and five, together: seconds 3 and 5; a step's time does not depend on the batch here."""
    engine = VirtualEngine(A_SECOND_A_TOKEN, batch=2)
    engine.admit(0, 0, 5)
    engine.admit(1, 0, 3)
    engine.admit(2, 0, 4)  # waits for a place until second 3
    assert [(engine.finish_next(), engine.now) for _ in range(3)] == [(1, 3.0), (0, 5.0), (2, 7.0)]
    assert engine.next_end() is None and engine.busy == 7.0


def test_context_is_read_again_at_every_token() -> None:
    """Weights 10, a cached token 1, bandwidth 1: prompts of 4 and 2; after 2 tokens one leaves, and its cache too.

    Steps cost 10 plus the context, which grows by one for each sequence: 2 * (10 + 6 + 2 / 2 * 2) = 36, then
    3 * (10 + 6 + 3 / 2) = 52.5 for the longer one, of 4 + 2 tokens by then.
    """
    engine = VirtualEngine(replace(A_SECOND_A_TOKEN, weights=10.0, token=1.0), batch=8)
    engine.admit(0, 4, 5)
    engine.admit(1, 2, 2)
    assert [(engine.finish_next(), engine.now) for _ in range(2)] == [(1, 36.0), (0, 88.5)]


def test_what_binds_is_memory_or_arithmetic() -> None:
    cost = DecodingCost(100.0, 1.0, 50.0, 0.0, bandwidth=10.0, peak=10.0, tokens=1)
    assert cost.step(1, 0) == 10.0 and cost.step(4, 0) == 20.0, "a large batch computes longer than it reads"
    assert cost.step(1, 200) == 30.0


def test_posts_are_dealt_as_workers_take_them() -> None:
    """Long responses have posts of their own; an engine that is done takes the next one."""
    lengths = [(0, 9000), (0, 5000), (0, 5000), (0, 5000)]
    found = generate(lengths, engines=2, cost=A_SECOND_A_TOKEN, concurrency=1)
    assert found.ends == (9000.0, 5000.0, 10000.0, 14000.0)
    assert found.seconds == 14000.0 and found.busy == (14000.0 + 10000.0) / 2


# ------------------------------------------------------------------------------------------------ clock
def test_a_bound_of_one_by_hand() -> None:
    """Draws of 10 s, training of 6 s, pushes of 2 s, during which the engines pause."""
    clock = Clock(bound=1)
    clock.take(0, 0.0)
    assert clock.drawn(0, 10.0) == (0.0, 10.0, ((0, 1000),))
    clock.push(16.0, 2.0)
    clock.take(1, 18.0)
    assert clock.drawn(1, 10.0) == (10.0, 22.0, ((0, 600), (1, 400)))
    clock.push(28.0, 2.0)
    clock.take(2, 30.0)
    assert clock.drawn(2, 10.0) == (22.0, 34.0, ((1, 600), (2, 400)))


def test_in_turns_engines_wait_for_the_weights() -> None:
    clock = Clock(bound=0)
    clock.take(0, 0.0)
    clock.drawn(0, 10.0)
    clock.push(16.0, 2.0)
    clock.take(1, 18.0)
    assert clock.drawn(1, 10.0) == (18.0, 28.0, ((1, 1000),))


def test_the_bound_is_the_products_own_check() -> None:
    prompt = Prompt("a", (1,), "", "")
    with pytest.raises(RunError, match="weights 2 steps old"):
        staleness(2, [Rollout(prompt, (0,), (0.0,), 0, "stop", 0)], bound=1)


# ------------------------------------------------------------------------------------------------ costs
def test_a_pass_by_hand(folder: Path, model: HFModel) -> None:
    """16 samples of 1,000 tokens on two data-parallel ranks of 4 GPUs: 8 each, 2 FLOPs per weight and token."""
    machine = Machine("H100", mfu=0.5)
    trainer = TrainerCost(sized(folder), model, machine, 8)
    matmul = 2 * (8_190_735_360 - 151_936 * 4096)  # without the embedding
    attention = 2 * 36 * 4096 * 1000
    found = trainer.forward([1000] * 16)
    assert trainer.dp == 2
    assert found.seconds == pytest.approx(8000 * (matmul + attention) / (4 * 0.5 * 989e12), rel=1e-3)
    assert found.busy == found.seconds, "equal samples"
    uneven = trainer.forward([1000] * 15)
    assert uneven.seconds == pytest.approx(found.seconds) and uneven.busy == pytest.approx(found.seconds * 15 / 16)


def test_bytes_by_hand(folder: Path, model: HFModel) -> None:
    """One copy exchanges no gradients; 36 layers reduce [T, 4096] of bfloat16 twice in a pass over four ranks."""
    trainer = TrainerCost(sized(folder), model, Machine(), 4)
    sent = trainer.bytes_by_link([100], forwards=1.0)
    assert sent["gradients_and_parameters"] == sent["context_parallel"] == sent["pipeline"] == 0
    assert sent["tensor_parallel"] == 100 * 2 * 36 * 2 * 0.75 * 4096 * 2 * (1 + 2)
    assert sent["samples"] == 800 and sent["weights_to_engines"] == 2 * 8_190_735_360
    two = TrainerCost(sized(folder), model, Machine(), 8).optimizer_bytes
    assert two == pytest.approx((4 + 2) * 8_190_735_360 / 4 / 2, rel=1e-3)


def test_gpus_must_hold_the_layout(folder: Path, model: HFModel) -> None:
    with pytest.raises(UserError, match="must be a multiple of tp \\* cp \\* pp = 4"):
        TrainerCost(sized(folder), model, Machine(), 6)


# ------------------------------------------------------------------------------------------------ lengths
def test_lengths_of_a_recorded_run(tmp_path: Path) -> None:
    prompt = Prompt("a", (1, 2, 3), "", "")
    rollouts = [Rollout(prompt, (5,) * length, (-0.5,) * length, 0, "stop", length) for length in (4, 9)]
    (tmp_path / "rollouts").mkdir()
    save_rollouts(rollouts_path(tmp_path / "rollouts", 1), rollouts)
    draw, rng = lengths_of(str(tmp_path), most=100), random.Random(0)
    assert {draw(rng) for _ in range(50)} == {(3, 4), (3, 9)}


@pytest.mark.parametrize("spec", ["lognormal:0,1", "lognormal:x", "nowhere"])
def test_other_lengths_are_refused(spec: str) -> None:
    with pytest.raises(UserError, match="--lengths"):
        lengths_of(spec, 100)


# ------------------------------------------------------------------------------------------------ whole simulations
def simulated(folder: Path, model: HFModel, shared: bool, bound: int, gpus: int = 8) -> Simulated:
    cluster = Cluster(gpus, gpus, True) if shared else Cluster(gpus // 2, gpus // 2, False)
    return simulate(sized(folder), model, Machine(), cluster, lengths_of(SPEC, 4096), bound)


def test_phases_make_the_step(folder: Path, model: HFModel) -> None:
    """The trainer waits for all of the generation in turns; nothing is stale; the same numbers again."""
    found = simulated(folder, model, shared=True, bound=0)
    phases = {name: value for name, value in found.seconds.items() if name != "total"}
    assert sum(phases.values()) == pytest.approx(found.seconds["total"])
    assert found.seconds["rollout"] == pytest.approx(found.generation_seconds)
    assert found.staleness == {"mean": 0.0, "max": 0.0}
    assert 0 < found.idle["all"] < 1
    assert found == simulated(folder, model, shared=True, bound=0)


def test_generation_beside_training_hides_the_shorter(folder: Path, model: HFModel) -> None:
    beside = simulated(folder, model, shared=False, bound=1)
    turns = simulated(folder, model, shared=False, bound=0)
    training = sum(turns.seconds[name] for name in ("old_logp", "reference", "update", "sync"))
    assert beside.seconds["total"] < 0.95 * turns.seconds["total"]
    assert beside.seconds["total"] >= 0.95 * max(training, turns.generation_seconds)
    assert 0 < beside.staleness["mean"] <= beside.staleness["max"] <= 1
    assert beside.idle["all"] < turns.idle["all"]


def test_more_gpus_are_faster_and_idle_more(folder: Path, model: HFModel) -> None:
    few, many = (simulated(folder, model, shared=True, bound=0, gpus=gpus) for gpus in (8, 64))
    assert many.seconds["total"] < few.seconds["total"] < 8 * many.seconds["total"]
    assert many.idle["all"] > few.idle["all"] and many.dp == 8 * few.dp


def test_a_fit_finds_the_constants(folder: Path, model: HFModel) -> None:
    """Fitted to a step that was simulated with known constants, whatever they are."""
    known = Fitted(400.0, Machine("H20", memory=96 * 10**9, mfu=MFU, decoding=0.2, logprobs=1.5))
    made = simulate_row(sized(folder), model, known, Row(True, 8, 0.0, 0.0, 0.0, 0.0))
    row = Row(True, 8, made.seconds["total"], made.generation_seconds, made.seconds["old_logp"], made.seconds["update"])
    found = fit(sized(folder), model, row)
    assert found.median == pytest.approx(400.0, rel=0.02)
    assert found.machine.decoding == pytest.approx(0.2, rel=0.02)
    assert found.machine.logprobs == pytest.approx(1.5, rel=0.02)
    assert simulate_row(sized(folder), model, found, row).seconds["total"] == pytest.approx(row.step, rel=0.01)


def test_the_first_hundred_steps(folder: Path) -> None:
    """494.4 of 790.1 seconds: generation 357.41 becomes 223.6; what a run does not have stays so."""
    first = ROWS[0].of("first 100")
    assert first.step == pytest.approx(494.4) and first.generation == pytest.approx(357.41 * 494.4 / 790.10)
    assert ROWS[3].of("first 100").old_logp is None and ROWS[0].of("all") == ROWS[0]
    hours = [(13, 44), (10, 22), (8, 36), (7, 58), (4, 57), (3, 13)]  # of a hundred steps, as published
    for row, (hour, minute) in zip(ROWS, hours, strict=True):
        assert row.hundred == pytest.approx((hour * 60 + minute) * 0.6, abs=0.05)


def test_few_sequences_wait_for_the_latency() -> None:
    """Reading takes 10 s and the latency 3, however few sequences there are; it comes on top of what binds."""
    cost = replace(A_SECOND_A_TOKEN, weights=10.0, latency=3.0)
    assert cost.step(1, 0) == 13.0 and replace(cost, flops=40.0).step(1, 0) == 43.0


def test_a_stream_does_not_wait_for_the_longest() -> None:
    """One engine, two at a time: each step has a response of 9 tokens and three of 3; alone it takes 12 s (3 + 9, for
    the short ones end beside it), and a stream of five steps one step per 9 s: 18 tokens by two at a time.
    """
    step = [(0, 3), (0, 3), (0, 3), (0, 9)]
    cost = replace(A_SECOND_A_TOKEN)
    alone = generate(step, engines=1, cost=cost, concurrency=2)
    stream = generate_on([step] * 5, engines=1, cost=cost, concurrency=2)
    assert alone.seconds == 12.0
    assert stream.seconds == pytest.approx(9.0, abs=1.0) and stream.busy <= stream.seconds


def test_the_published_sizes(folder: Path) -> None:
    config = as_published(sized(folder))
    assert (config.rollout.prompts_per_step, config.rollout.group_size, config.optimizer.updates_per_step) == (
        512,
        16,
        16,
    )
    assert config.rollout.max_response_tokens == 28 * 1024 and config.engine.tp == config.parallel.cp == 4


def test_the_command(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "sizes.json"
    arguments = ["-c", str(tmp_path / "run.yaml"), "--simulate", "--nodes", "1", "--nodes", "2", "--json", str(file)]
    (tmp_path / "run.yaml").write_text(
        f"model: {{path: {folder}, dtype: bfloat16}}\ndata: {{source: 'task:cipher'}}\nparallel: {{tp: 4, sp: true}}\n"
        "rollout: {prompts_per_step: 16, group_size: 4, max_response_tokens: 2048}\n"
        "optimizer: {updates_per_step: 2}\nalgorithm: {name: dapo}\n"
    )
    result = CliRunner().invoke(app, ["plan", *arguments, "--lengths", SPEC], terminal_width=200)
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    sizes = [(one["gpus"], one["shared"]) for one in found["simulated"]]
    assert sizes == [(8, True), (8, False), (16, True), (16, False)]
    assert "guesses, not measured" in " ".join(result.output.split())
