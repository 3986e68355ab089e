"""`owpo launch` on a real Slurm of three nodes that are one machine: real networks and file systems are not covered."""

from __future__ import annotations

import json
import stat
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from launched import Launched, kill_rank, processes
from owpo import Owpo, lines_of, newest_step, steps_of

pytestmark = [pytest.mark.ranks, pytest.mark.slurm]
WORKER = "owpo_megatron.workers.process"


@pytest.fixture(scope="module")
def straight(lab: Any, tiny_run: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Ten steps with tp=2 over two nodes, uninterrupted, as the first of a chain of two jobs."""
    run = Launched(tmp_path_factory.mktemp("straight"), "straight", tiny_run)
    run.submit("--chain", "2")
    assert run.wait_for_end() == ["COMPLETED", "COMPLETED"], run.told()
    return run


def test_a_chain_ends_with_the_run(straight: Launched) -> None:
    assert [line["step"] for line in steps_of(straight.run_dir)] == list(range(1, 11))
    assert "an earlier job of the chain has finished the run" in straight.words()
    assert (straight.run_dir / "summary.json").exists()


def test_logs_and_status_are_at_hand(straight: Launched) -> None:
    run_dir = str(straight.run_dir)
    status = Owpo(straight.here, "launch", "status", run_dir).done()
    assert status.count("COMPLETED") == 2 and " 10" in status
    assert "done: " in Owpo(straight.here, "launch", "attach", run_dir).done()
    assert "an earlier job of the chain" in Owpo(straight.here, "launch", "logs", run_dir).done()
    attempt = next((straight.run_dir / "logs").glob("*.0/rank_1.log")).parent
    log = Owpo(straight.here, "launch", "logs", run_dir, "--rank", "1", "--attempt", attempt.name).done()
    assert log == (attempt / "rank_1.log").read_text()


def test_a_rank_a_node_and_the_time_limit_cost_no_bit(
    lab: Any, straight: Launched, tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    """A killed rank, a node that dies, Slurm's warning before the time limit: three requeues, the same numbers.

    The warning is sent by scancel, as the signal that --signal=B:USR1 sends: the shortest time limit is a minute.
    """
    run = Launched(tmp_path, "calamities", tiny_run)
    job = run.submit()
    run.wait_until(lambda: newest_step(run.run_dir) >= 3, "step 3")
    kill_rank(job, 1)
    run.wait_until(lambda: "requeued: failure (1 of at most 3)" in run.words(), "requeue after a failure")
    run.wait_until(lambda: newest_step(run.run_dir) >= 5, "step 5")
    dead = "n1" if "n1" in run.states()[0].nodes or "[0-" in run.states()[0].nodes else "n2"
    lab.node_dies(dead)
    try:
        run.wait_until(lambda: run.states()[0].attempt == 2 and run.states()[0].state == "RUNNING", "requeue by Slurm")
        run.wait_until(lambda: newest_step(run.run_dir) >= 7, "step 7")
        subprocess.run(["scancel", "--batch", "--signal=USR1", str(job)], check=True)
        run.wait_until(lambda: "requeued: continuation (1 of at most 100)" in run.words(), "requeue after saving")
        saved_at = newest_step(run.run_dir)
        assert saved_at < 10, "the run was over before its time was"
        assert run.wait_for_end() == ["COMPLETED"], run.told()
    finally:
        # Not before: to a node that is back Slurm repeats the order to end what it had of this job, and that would end
        # a later attempt there, which has the same id.
        lab.node_is_back(dead)
    assert run.states()[0].attempt == 3
    assert f"resumed at step {saved_at}" in run.words(), "the step of the warning was saved"
    assert steps_of(run.run_dir) == steps_of(straight.run_dir)
    for file in (straight.run_dir / "hf").glob("*.safetensors"):
        assert (run.run_dir / "hf" / file.name).read_bytes() == file.read_bytes()
    assert len(list((run.run_dir / "logs").glob(f"{job}.*/rank_0.log"))) == 4


@pytest.mark.server
def test_engine_on_its_own_node(lab: Any, engine_python: Path, tiny_run: dict[str, Any], tmp_path: Path) -> None:
    """Two data-parallel nodes and a third with SGLang: found by its file, closed to strangers, gone with the job."""
    layers = {
        "rollout": {**tiny_run["rollout"], "replay": None},
        "optimizer": {"steps": 300},
        "parallel": {"tp": 1, "dp": 2},
        "sglang": {"max_total_tokens": 4096},
    }
    run = Launched(tmp_path, "engine", tiny_run, layers)
    job = run.submit("--engine-nodes", "1")
    file = run.run_dir / "rendezvous" / f"{job}.0" / "engine_0.json"
    run.wait_until(file.exists, "engine")
    told = json.loads(file.read_text())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert httpx.get(told["url"] + "/model_info", trust_env=False).status_code == 401
    assert not any(told["key"] in " ".join(process.cmdline()) for process in processes(job))
    run.wait_until(lambda: newest_step(run.run_dir) >= 2, "step 2")
    workers = [process.cmdline()[-1] for process in processes(job) if WORKER in process.cmdline()]
    assert sorted(workers) == ["0", "1"], "a rollout worker on each of the trainer's nodes"
    assert max(line["mismatch"] for line in steps_of(run.run_dir)) < 1e-4, "trainer and engine have the same weights"
    Owpo(tmp_path, "launch", "cancel", str(run.run_dir), "--save").done()
    assert run.wait_for_end() == ["COMPLETED"], run.told()
    saved_at = newest_step(run.run_dir)
    assert max(int(folder.name[-6:]) for folder in (run.run_dir / "checkpoints").glob("step_*")) == saved_at < 300
    assert processes(job) == []

    again = run.submit("--engine-nodes", "1")
    run.wait_until(lambda: newest_step(run.run_dir) > saved_at, "another step, with another engine")
    assert f"resumed at step {saved_at}" in run.words()
    second = Owpo(tmp_path, "launch", "-c", str(run.config), "--engine-nodes", "1")
    assert second.wait() == 2 and f"job {again} is running" in second.stderr
    Owpo(tmp_path, "launch", "cancel", str(run.run_dir)).done()
    assert run.wait_for_end() == ["CANCELLED"]
    run.wait_until(lambda: not processes(again), "end of every process", timeout=30)
    assert not run.states()[0].attempt and "requeued" not in run.words()


def test_an_array_of_seeds_and_a_mistake_that_only_the_job_can_find(
    lab: Any, tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    """Two seeds of one step on a node each; seed 2's data has gone when it starts: that is not tried again."""
    from owpo_megatron.config import Config

    layers = {"optimizer": {"steps": 1}, "parallel": {"tp": 1}, "checkpoint": {"export_hf": False}}
    run = Launched(tmp_path, "array", tiny_run, layers)
    replay = {seed: tmp_path / f"recorded-{seed}" for seed in (3, 4)}
    replay[3].symlink_to(tiny_run["rollout"]["replay"])
    subprocess.run(["scontrol", "update", "nodename=n[0-2]", "state=drain", "reason=test"], check=True)
    run.submit("--nodes", "1", "--seeds", "3,4")
    for seed, folder in replay.items():  # while it waits in the queue
        file = run.run_dir.with_name(f"array-seed{seed}") / "config.yaml"
        Config.load(file, [f"rollout.replay={folder}"]).save(file)
    subprocess.run(["scontrol", "update", "nodename=n[0-2]", "state=resume"], check=True)
    assert sorted(run.wait_for_end()) == ["COMPLETED", "FAILED"], run.told()
    assert [line["step"] for line in lines_of(run.run_dir.with_name("array-seed3"))] == [1]
    assert "error: rollout.replay" in run.words() and "not requeued: the same mistake" in run.words()
