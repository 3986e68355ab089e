"""Workers as processes of their own, before a server that answers what it was given. Real engines: tests/e2e."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from waiting import wait_until

from owpo_megatron.bench.answer_server import answer_server
from owpo_megatron.engine.client import EngineClient
from owpo_megatron.engine.replies import EngineGone, EngineWrong
from owpo_megatron.errors import EngineError, RunError
from owpo_megatron.types import Prompt, Rollout, SampleRequest, Sampling
from owpo_megatron.workers import WorkerPool, WorkerProcess, handle
from owpo_megatron.workers import member as member_module

pytestmark = pytest.mark.process

BODIES = [
    json.dumps(
        {
            "output_ids": [seed + 1, 2],
            "meta_info": {
                "finish_reason": {"type": "stop"},
                "weight_version": "3",
                "output_token_logprobs": [[-0.5, seed + 1, None], [-1.25, 2, None]],
            },
        }
    ).encode()
    for seed in range(8)
]
SAMPLING = Sampling(4)
REQUESTS = [SampleRequest(Prompt(str(seed), (5, 6), "q", "a"), seed) for seed in range(8)]
Start = Callable[..., tuple[WorkerPool, list[WorkerProcess], list[str]]]


@pytest.fixture
def client() -> Iterator[EngineClient]:
    with answer_server(BODIES) as url, closing(EngineClient(url)) as client:
        yield client


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with ExitStack() as stack:

        def started(
            count: int, listed: int | None = None, restarts: int = 0
        ) -> tuple[WorkerPool, list[WorkerProcess], list[str]]:
            said: list[str] = []
            pool = WorkerPool("127.0.0.1", listed or count, notify=said.append)
            stack.callback(pool.close)
            processes = []
            for index in range(count):
                log = tmp_path / f"rollout_worker_{index}.log"
                process = WorkerProcess(index, pool.address, pool.key, log, restarts)
                stack.callback(process.close)
                processes.append(process)
            return pool, processes, said

        yield started


def drawn(pool: WorkerPool, client: EngineClient, version: int | None = None) -> list[Rollout]:
    posts = [pool.over(client).submit([one], SAMPLING, version) for one in REQUESTS]
    return [post.result(30)[0] for post in posts]


def test_a_lost_worker_changes_nothing(start: Start, client: EngineClient) -> None:
    """Three workers, then two, then none: always what the client itself gets. Each loss is reported once."""
    expected = [client.generate([one], SAMPLING)[0] for one in REQUESTS]
    assert [list(one.response_ids) for one in expected] == [[seed + 1, 2] for seed in range(8)]
    pool, processes, said = start(3)
    pool.wait(60)
    assert drawn(pool, client) == expected and not said
    for count in (1, 3):
        for process in processes[:count]:
            if process.process.poll() is None:
                os.kill(process.process.pid, signal.SIGKILL)
                process.process.wait()
        assert drawn(pool, client) == expected
        assert pool.lost == count
    assert len(said) == 3 and "its responses go to the other 2" in said[0] and "rank 0 asks" in said[-1]


def test_a_worker_comes_back(start: Start, client: EngineClient) -> None:
    """Twice, as often as it may; each time it takes posts again. Then rank 0 asks itself, and closing ends nothing."""
    expected = [client.generate([one], SAMPLING)[0] for one in REQUESTS]
    pool, (worker,), said = start(1, restarts=2)
    pool.wait(60)
    for losses in (1, 2):
        first = worker.process
        first.kill()
        wait_until(lambda count=losses: said.count("rollout worker 0 is back") == count)
        assert pool.lost == losses and worker.process is not first
        assert [len(member.posts) for member in pool._members] == [0]
        assert drawn(pool, client) == expected
    worker.process.kill()
    wait_until(lambda: pool.lost == 3)
    assert "rank 0 asks for responses itself" in said[-1]
    watch = [thread for thread in threading.enumerate() if thread.name == "rollout-worker"]
    wait_until(lambda: not any(thread.is_alive() for thread in watch))
    assert drawn(pool, client) == expected and len(said) == 5


def test_no_worker_starts_after_its_rank_has_closed_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "RESTART_SECONDS", 60.0)
    pool, (worker,), said = start(1, restarts=1)
    pool.wait(60)
    process = worker.process
    process.kill()
    wait_until(lambda: pool.lost == 1)
    worker.close()
    wait_until(lambda: all(thread.name != "rollout-worker" for thread in threading.enumerate()))
    assert worker.process is process and len(said) == 1


def test_posts_under_way_at_a_worker_that_is_stopped_go_to_another(
    start: Start, client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member_module, "PING_SECONDS", 0.2)
    monkeypatch.setattr(member_module, "SILENT_SECONDS", 2.0)
    pool, processes, said = start(2)
    pool.wait(60)
    os.kill(processes[0].process.pid, signal.SIGSTOP)
    try:
        assert [list(one.response_ids) for one in drawn(pool, client)] == [[seed + 1, 2] for seed in range(8)]
    finally:
        os.kill(processes[0].process.pid, signal.SIGCONT)
    assert len(said) == 1 and "silent for 2 s" in said[0]


def test_an_engines_error_is_the_same_error(start: Start, client: EngineClient) -> None:
    """The wrong version of the weights: a lost engine for the fleet, by its URL; the worker stays."""
    pool, _, said = start(1)
    pool.wait(60)
    with pytest.raises(EngineWrong, match="though 4 were pushed") as found:
        drawn(pool, client, version=4)
    assert found.value.url == client.url and not said
    assert len(drawn(pool, client, version=3)) == 8


def test_workers_end_with_the_pool(start: Start) -> None:
    """And so do the posts under way: here, at a server that never answers."""
    pool, processes, said = start(2)
    pool.wait(60)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        silent = EngineClient(f"http://127.0.0.1:{mute.getsockname()[1]}")
        post = pool.submit(silent, REQUESTS[:1], SAMPLING)
        pool.close()
        with pytest.raises(EngineError, match="the rollout workers are closed") as found:
            post.result(10)
        assert not isinstance(found.value, EngineGone), "no engine is restarted for it"
    assert [process.process.wait(10) for process in processes] == [0, 0] and not said


def test_a_worker_that_is_not_there_is_named(start: Start) -> None:
    pool, _, _ = start(1, listed=2)
    with pytest.raises(RunError, match=r"rollout worker.* did not answer at .* within 3 s.*rollout.workers=0"):
        pool.wait(3.0)


def test_strangers_are_no_workers(start: Start, client: EngineClient, tmp_path: Path) -> None:
    """One is silent, one has another key."""
    pool, _, _ = start(1)
    stranger = WorkerProcess(7, pool.address, b"x" * 32, tmp_path / "stranger.log")
    with socket.create_connection(pool.address):
        pool.wait(60)
        assert len(drawn(pool, client)) == 8
    deadline = time.monotonic() + 30
    while stranger.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert stranger.process.poll(), "it is refused"
    stranger.close()
