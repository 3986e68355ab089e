"""Short runs on recorded rollouts: every method, and the same numbers from every parallel layout.

Recorded by a fake engine, so `mismatch` is meaningless here; pipelines with virtual stages are in tests/mcore.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from coupled_methods import COUPLED, NINE
from owpo import steps_of, write_config
from rank_pool import Ranks
from warm import train, train_all

from owpo_megatron.methods import find_method

LAYOUTS = [{"pp": 2}, {"dp": 2}, {"tp": 2, "sp": True}]


def run(ranks: Ranks, recorded: dict[str, Any], here: Path, name: str, *layers: dict[str, Any]) -> list[dict[str, Any]]:
    """The step lines of a run that came to its end."""
    config = write_config(here / f"{name}.yaml", recorded, {"name": name, "checkpoint": {"export_hf": False}}, *layers)
    train(ranks, config)
    return steps_of(Path(recorded["runs_dir"]) / name)


@pytest.fixture(scope="module")
def one_rank(ranks: Ranks, recorded: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Three steps on one rank, with a swap after the second."""
    return run(ranks, recorded, tmp_path_factory.mktemp("one"), "one_rank", THREE)


THREE: dict[str, Any] = {"optimizer": {"steps": 3, "lr": 1e-3}, "reference": {"every": 2}}


@pytest.mark.parametrize("parallel", LAYOUTS, ids=str)
def test_a_layout_changes_no_number(
    ranks: Ranks, recorded: dict[str, Any], one_rank: list[dict[str, Any]], tmp_path: Path, parallel: dict[str, Any]
) -> None:
    """Equality up to rounding, which two updates of a step and two steps carry on."""
    name = "_".join(map(str, parallel))
    ours = run(ranks, recorded, tmp_path, f"layout_{name}", THREE, {"parallel": parallel})
    for our_line, their_line in zip(ours, one_rank, strict=True):
        assert our_line.keys() == their_line.keys()
        for field in ("loss", "grad_norm", "w_mean", "ratio_mean", "kl_old", "entropy"):
            assert our_line[field] == pytest.approx(their_line[field], abs=1e-5, rel=1e-5), field
        for field in ("step", "stage", "n_active", "ref_id", "ref_step", "tokens", "active_tokens", "prompts_seen"):
            assert our_line[field] == their_line[field], field
    assert ours[1]["abs_delta"] > 1e-3, "the policy did not move; the comparison would be meaningless"


def test_an_offloaded_optimizer_changes_no_bit(ranks: Ranks, recorded: dict[str, Any], tmp_path: Path) -> None:
    """Two data-parallel ranks, each with its half of the moments."""
    offloaded = {"optimizer": THREE["optimizer"] | {"offload": True}}
    stays, away = (
        run(ranks, recorded, tmp_path, f"offload_{index}", THREE, layer, {"parallel": {"dp": 2}})
        for index, layer in enumerate(({}, offloaded))
    )
    assert away == stays and len(away) == 3 and away[-1]["weights"]


# name -> what a configuration calls it: the paper's, and one for each coupling that comes from a module of one's own;
# every method of the catalogue: tests/policy/test_method_updates.py
METHODS = {name: name for name in NINE} | {
    method.name: f"python:coupled_methods:{type(method).__name__}" for method in COUPLED
}


@pytest.fixture(scope="module")
def of_methods(
    ranks: Ranks, recorded: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Two steps of two updates by every method, on one rank; in step 2 the reference is not the policy."""
    here = tmp_path_factory.mktemp("methods")
    files = []
    for name, known_as in METHODS.items():
        run_of = {"name": f"method_{name}", "algorithm": {"name": known_as}, "optimizer": {"steps": 2}}
        layers = (recorded, run_of, {"checkpoint": {"export_hf": False}})
        files.append(write_config(here / f"{name}.yaml", *layers))
    train_all(ranks, files)
    return {name: steps_of(Path(recorded["runs_dir"]) / f"method_{name}") for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains(of_methods: dict[str, list[dict[str, Any]]], name: str) -> None:
    lines = of_methods[name]
    assert len(lines) == 2
    for line in lines:
        numbers = [value for value in line.values() if isinstance(value, float)]
        assert all(math.isfinite(value) for value in numbers)
        assert line["updates"] == 2
    assert lines[-1]["grad_norm"] > 0
    method = find_method(METHODS[name])
    assert ("kl_ref" in lines[1]) == (method.reference != "none")
    assert ("w_mean" in lines[1]) == (method.reference == "active")
    assert name != "uncertain_tokens" or 0.3 < lines[1]["kept"] <= 0.7, "a metric of its own"


def test_methods_differ(of_methods: dict[str, list[dict[str, Any]]]) -> None:
    """No two are one method under two names."""
    second = {name: (lines[1]["loss"], lines[1]["grad_norm"]) for name, lines in of_methods.items()}
    assert len(set(second.values())) == len(METHODS)
