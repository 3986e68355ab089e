"""Variables that another launcher left behind: no sign of torchrun, named, and not handed to the ranks."""

from __future__ import annotations

import json
import os

import pytest

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.launch import preflight
from owpo_megatron.launch.local import rank_environment
from owpo_megatron.launch.machine import LAUNCHER_VARIABLES, launcher_leftovers, started_by_torchrun

POD = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"}
TORCHRUN = POD | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}


@pytest.fixture
def environment(monkeypatch):
    def set_to(**variables):
        for name in LAUNCHER_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "4"}, {"RANK": "0"}, POD, POD | {"LOCAL_RANK": "0"}])
def test_leftovers_start_nothing_and_reach_no_rank(left, environment):
    environment(**left)
    assert not started_by_torchrun() and launcher_leftovers() == left
    inherited = rank_environment(1)
    assert not inherited.keys() & set(LAUNCHER_VARIABLES)
    assert inherited["PATH"] == os.environ["PATH"]


def test_torchrun_is_known_by_what_only_it_sets(environment):
    environment(**TORCHRUN)
    assert started_by_torchrun() and launcher_leftovers() == {}
    environment()
    assert not started_by_torchrun() and launcher_leftovers() == {}


def test_a_torchrun_of_another_size_is_refused_before_anything_starts(environment):
    environment(**TORCHRUN)
    config = Config.build({"model": {"path": "m"}, "data": {"source": "x.jsonl"}})
    with pytest.raises(
        UserError, match=r"WORLD_SIZE = 4: torchrun started so many ranks, and parallel.tp \* pp \* dp is 1"
    ):
        preflight._devices(config)
    environment(**POD)
    preflight._devices(config)


@pytest.mark.process
def test_a_rank_sees_a_clean_environment(environment, tmp_path, monkeypatch):
    """The product's own way to start ranks, with a program that writes down what it inherits."""
    from owpo_megatron.launch.local import run_ranks

    (tmp_path / "shows.py").write_text(
        "import json, os, sys\nopen(sys.argv[1], 'w').write(json.dumps({n: v for n, v in os.environ.items()}))\n"
    )
    environment(**POD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    outcome = run_ranks([str(tmp_path / "seen.json")], 1, tmp_path / "logs", "shows")
    assert outcome.code == 0, outcome
    assert not json.loads((tmp_path / "seen.json").read_text()).keys() & POD.keys()
