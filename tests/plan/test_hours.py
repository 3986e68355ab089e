"""GPU hours against the formulae of docs/plan.md, worked out again; nothing here was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from recipe_models import SHAPES

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.families import HFModel, read_hf_config
from owpo_megatron.families.weights import forward_flops
from owpo_megatron.plan.engine import engine_memory
from owpo_megatron.plan.hours import Assumptions, generation_seconds, gpu_hours, training_seconds

RECIPE = Path(__file__).parents[2] / "examples" / "qwen2.5-math-7b" / "config.yaml"
GIB = 2**30
GUESS = Assumptions(gpu="H100", length_share=0.5, groups_drawn=2.0, prompt_tokens=100, mfu=0.4, bandwidth_share=0.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> HFModel:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(SHAPES["qwen2.5-math-7b"]))
    return read_hf_config(folder)


def config(*overrides: str) -> Config:
    return Config.load(RECIPE, overrides)


def test_passes_of_the_trainer(model: HFModel) -> None:
    """Full recomputation: an update counts 4, the old policy 1, a reference 1, or 17/32 of it for OWPO's G = 16."""
    seconds = {
        name: training_seconds(config(f"algorithm.name={name}"), model, 8192, GUESS) for name in ("dapo", "owpo")
    }
    seconds["sym_dapo"] = training_seconds(config("algorithm.name=sym_dapo"), model, 8192, GUESS)
    assert seconds["owpo"] / seconds["dapo"] == pytest.approx((5 + 17 / 32) / 5)
    assert seconds["sym_dapo"] / seconds["dapo"] == pytest.approx(6 / 5)
    matmul, attention = forward_flops(model)
    length = 100 + 0.5 * 8192
    expected = 8192 * length * 5 * (matmul + attention * length) / (8 * 989e12 * 0.4)
    assert seconds["dapo"] == pytest.approx(expected)
    assert matmul == pytest.approx(2 * 7.07e9, rel=0.01)  # 7.6 B parameters without the embedding


def test_decoding_is_bound_by_memory(model: HFModel) -> None:
    """Eight engines of one GPU, each reading its weights and its batch's cache once for every token of the batch."""
    settings = config("engine.concurrency=64")
    memory = engine_memory(settings, model, 80 * GIB)
    read = memory.weights + 64 * (100 + 2048) * memory.token
    expected = 100_000 * 4096 / (8 * 64 / (read / (0.5 * 3.35e12)))
    assert generation_seconds(settings, model, 80 * GIB, 100_000, GUESS) == pytest.approx(expected)
    alone = 8192 * memory.weights / (0.5 * 3.35e12)
    assert generation_seconds(settings, model, 80 * GIB, 1, GUESS) == pytest.approx(alone)


def test_hours_are_of_all_reserved_gpus(model: HFModel) -> None:
    one = gpu_hours(config(), model, 80 * GIB, (), GUESS)
    twice = gpu_hours(config("optimizer.steps=800"), model, 80 * GIB, (), GUESS)
    assert twice.total == pytest.approx(2 * one.total) and one.evaluations == 0
    assert one.updates == pytest.approx(400 * training_seconds(config(), model, 8192, GUESS) * 8 / 3600)
    evaluated = gpu_hours(config(), model, 80 * GIB, [960] * 3, GUESS)
    each = generation_seconds(config(), model, 80 * GIB, 960, GUESS) * 8 / 3600
    assert evaluated.evaluations == pytest.approx(3 * each) and evaluated.rollouts == one.rollouts
    every_group = gpu_hours(config("rollout.dynamic_sampling=false"), model, 80 * GIB, (), GUESS)
    assert one.rollouts == pytest.approx(2 * every_group.rollouts)


def test_only_gpus_whose_bandwidth_is_known() -> None:
    with pytest.raises(UserError, match="--gpu = V100: use one of H200, H100, H20, A100"):
        replace(GUESS, gpu="V100")
