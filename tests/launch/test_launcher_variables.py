"""Variables that another launcher left behind: no sign of torchrun, named, and not handed to the ranks."""

from __future__ import annotations

import json
import os

import pytest

from owpo_megatron.config import Config
from owpo_megatron.errors import UserError
from owpo_megatron.launch import preflight
from owpo_megatron.launch.local import rank_environment
from owpo_megatron.launched import is_launcher_variable, launcher_leftovers, started_by_torchrun

POD = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"}
TORCHRUN = POD | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none"}


@pytest.fixture
def environment(monkeypatch):
    def set_to(**variables):
        for name in filter(is_launcher_variable, dict(os.environ)):
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


KUBEFLOW = POD | {"PET_NNODES": "4", "PET_MASTER_ADDR": "pod-0", "PET_MAX_RESTARTS": "3", "PET_STANDALONE": "1"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "1", "PMI_RANK": "1", "PMI_SIZE": "4"}
SRUN_SHELL = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
AGENT = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_ERROR_FILE": "/no"}


@pytest.mark.parametrize(
    "left",
    [{"WORLD_SIZE": "4"}, {"RANK": "0"}, POD, POD | {"LOCAL_RANK": "0"}, KUBEFLOW, MPIRUN, SRUN_SHELL, AGENT]
    + [{"TORCHELASTIC_RUN_ID": "none"}, {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "1"}],
)  # fmt: skip
def test_leftovers_start_nothing_and_reach_no_rank(left, environment):
    environment(**left)
    assert not started_by_torchrun() and launcher_leftovers() == left
    inherited = rank_environment(1)
    assert not inherited.keys() & left.keys()
    assert inherited["PATH"] == os.environ["PATH"]


def test_what_a_whole_job_has_stays(environment, monkeypatch):
    """Rules and hooks of users read it, and a shell inside an allocation is no leftover."""
    environment()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    assert launcher_leftovers() == {} and rank_environment(2)["SLURM_JOB_ID"] == "7"


@pytest.mark.parametrize("left", [KUBEFLOW | MPIRUN, AGENT | {"WORLD_SIZE": "4"}])
def test_a_world_of_one_in_this_process_is_one(left, environment):
    """Cases: `train()` of a notebook in such a pod, a worker of `owpo compare`, a bench."""
    from owpo_megatron.config import ParallelConfig
    from owpo_megatron.mcore.topology import close_topology, init_topology

    environment(**left)
    topology = init_topology(ParallelConfig(), seed=0)
    close_topology()
    assert (topology.rank, topology.world_size, topology.is_main) == (0, 1, True)


def test_torchrun_is_known_by_what_only_it_sets(environment):
    environment(**TORCHRUN)
    assert started_by_torchrun() and launcher_leftovers() == {}
    environment()
    assert not started_by_torchrun() and launcher_leftovers() == {}


def test_a_torchrun_of_another_size_is_refused_before_anything_starts(environment):
    environment(**TORCHRUN)
    config = Config.build({"model": {"path": "m"}, "data": {"source": "x.jsonl"}})
    with pytest.raises(
        UserError, match=r"WORLD_SIZE = 4: torchrun started so many ranks, and parallel.tp \* cp \* pp \* dp is 1"
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
