"""The pool of ranks (rank_pool.py): results, groups, failures that name themselves, and the bits of a real launch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rank_pool import TESTS, RankFailed, Ranks
from tiny import build_policy, make_config, make_hf_model, random_samples


def place(offset: int) -> tuple[int, int, float]:
    """(rank, world size, sum over the ranks of rank + offset)."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    total_1 = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(total_1)
    return dist.get_rank(), dist.get_world_size(), float(total_1)


def fail_on_rank_1(how: str) -> None:
    """The other ranks wait for it in a collective."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        print("on its way")
        if how == "raises":
            raise ValueError("made to fail")
        if how == "exits":
            sys.exit(3)
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hangs":
            wait_for_ever()
    dist.barrier()


def wait_for_ever() -> None:
    while True:
        time.sleep(0.1)


def train(model: str, layout: dict[str, int], folder: str) -> None:
    """Two updates; each rank's parameters and sums, to the last bit, go to a file."""
    import torch

    from owpo_megatron.methods import make_method

    policy = build_policy(make_config(Path(model), parallel=layout))
    sums = [policy.update(random_samples(seed), make_method("owpo")) for seed in range(2)]
    parameters = [param.detach().clone() for chunk in policy._chunks for param in chunk.parameters()]
    torch.save((sums, parameters), f"{folder}/rank_{policy.topology.rank}.pt")


def test_each_rank_returns_what_it_found_whatever_ran_before(ranks: Ranks) -> None:
    assert ranks.run(2, place, 0) == [(0, 2, 1.0), (1, 2, 1.0)]
    assert ranks.run(4, place, 1) == [(rank, 4, 10.0) for rank in range(4)]
    assert ranks.run(2, place, 5) == [(0, 2, 11.0), (1, 2, 11.0)]


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("raises", "rank 1: raised\nTraceback"),
        ("exits", "SystemExit: 3"),
        ("dies", "rank 1: no answer, exit code -9"),
        ("hangs", "in wait_for_ever"),
    ],
)
def test_a_rank_that_fails_is_named_and_the_next_job_runs(ranks: Ranks, how: str, named: str) -> None:
    with pytest.raises(RankFailed) as failure:
        ranks.run(2, fail_on_rank_1, how, timeout=5 if how == "hangs" else 60)
    assert named in str(failure.value) and "on its way" in str(failure.value)
    if how == "raises":
        assert "ValueError: made to fail" in str(failure.value)
    assert ranks.run(2, place, 0) == [(0, 2, 1.0), (1, 2, 1.0)]


def test_same_bits_as_in_fresh_processes(ranks: Ranks, tmp_path: Path) -> None:
    """The same job under torchrun, in processes that import everything themselves; under launch/forked.py, as a run on
    a CPU has its ranks; and twice in the pool."""
    import torch

    from owpo_megatron.launch.local import rank_command, torchrun_command

    layout, logs = {"tp": 2}, tmp_path / "logs"
    model = make_hf_model(tmp_path / "model", vocab_size=97)
    for name in ("pool", "again", "fresh", "forked"):
        (tmp_path / name).mkdir()
    for name in ("pool", "again"):
        ranks.run(2, train, str(model), layout, str(tmp_path / name))
    code = "import json, sys, test_rank_pool as t; t.train(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])"
    (tmp_path / "owpo_job.py").write_text(code)
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), str(Path(__file__).parent), str(tmp_path)])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    for name, make_command in {"fresh": torchrun_command, "forked": rank_command}.items():
        arguments = [str(model), json.dumps(layout), str(tmp_path / name)]
        command = make_command(2, logs, "owpo_job", arguments)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:] + (logs / "rank_0.log").read_text()
    for rank in range(2):
        (sums, parameters), *others = (
            torch.load(tmp_path / name / f"rank_{rank}.pt") for name in ("fresh", "forked", "pool", "again")
        )
        assert len(parameters) > 10
        for other_sums, other in others:
            assert other_sums == sums
            assert all(torch.equal(a, b) for a, b in zip(other, parameters, strict=True))


def test_nothing_of_a_job_stays(ranks: Ranks) -> None:
    """Neither its processes nor what it changed in them."""
    first = ranks.run(2, mark_process)
    second = ranks.run(2, mark_process)
    assert [marked for _, marked in first + second] == [False] * 4
    assert not any(is_alive(pid) for pid, _ in first + second)


def mark_process() -> tuple[int, bool]:
    import torch

    marked: Any = getattr(torch, "marked_by_a_test", False)
    torch.marked_by_a_test = True  # type: ignore[attr-defined]
    return os.getpid(), marked


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
