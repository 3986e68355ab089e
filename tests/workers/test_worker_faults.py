"""Workers that stop, end, or send what is no answer, and strangers: nothing hangs, leaks or is blamed on a worker.

Some workers are connections of this process alone, to stop in the middle of a message.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from waiting import wait_until

from owpo_megatron.bench.answer_server import answer_server
from owpo_megatron.engine.client import EngineClient
from owpo_megatron.errors import RunError
from owpo_megatron.types import Prompt, SampleRequest, Sampling
from owpo_megatron.workers import WorkerPool, WorkerProcess, joining
from owpo_megatron.workers import member as member_module
from owpo_megatron.workers.joining import join
from owpo_megatron.workers.messages import PING, Ask, Ready

pytestmark = pytest.mark.process

META = {"finish_reason": {"type": "stop"}, "weight_version": "3", "output_token_logprobs": [[-0.5, 7, None]]}
BODY = json.dumps({"output_ids": [7], "meta_info": META}).encode()
ONE, SAMPLING, WAIT = [SampleRequest(Prompt("0", (5, 6), "q", "a"), 0)], Sampling(4), 30


@pytest.fixture
def client() -> Iterator[EngineClient]:
    with answer_server([BODY]) as url, closing(EngineClient(url)) as client:
        yield client


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    """A pool for one worker, which may be silent for a second; `lines` has what it reported."""
    monkeypatch.setattr(member_module, "PING_SECONDS", 0.1)
    monkeypatch.setattr(member_module, "SILENT_SECONDS", 1.0)
    lines: list[str] = []
    pool = WorkerPool("127.0.0.1", 1, notify=lines.append)
    pool.lines = lines  # type: ignore[attr-defined]
    yield pool
    pool.close()


def connected_worker(pool: WorkerPool) -> Connection:
    connection = join(pool.address, pool.key, 0)
    assert connection.recv() is None
    connection.send(Ready())
    pool.wait(WAIT)
    return connection


def asked(connection: Connection) -> Ask:
    """The next post, past requests for a sign of life."""
    while (message := connection.recv()) == PING:
        pass
    return message


def test_a_worker_that_reads_nothing_keeps_nobody_waiting(pool: WorkerPool, client: EngineClient) -> None:
    """Posts of 16 MB, which no socket takes in: `submit` returns, and the worker is lost after its time."""
    connection = connected_worker(pool)
    large = [SampleRequest(Prompt("0", (5, 6), "x" * 1_000_000, "a"), 0)]
    posts: list[Any] = []
    thread = threading.Thread(
        target=lambda: posts.extend(pool.submit(client, large, SAMPLING) for _ in range(16)), daemon=True
    )
    thread.start()
    thread.join(WAIT)
    assert len(posts) == 16
    assert all(list(post.result(WAIT)[0].response_ids) == [7] for post in posts), "drawn by rank 0"
    assert pool.lost == 1 and "silent for 1 s" in pool.lines[0]  # type: ignore[attr-defined]
    connection.close()


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"\0\0\0\x64half of an answer", "silent for 1 s"),
        (b"\0\0\0\x07garbage", "UnpicklingError|pickle"),
    ],
)
def test_what_is_no_answer_ends_the_worker_alone(pool: WorkerPool, client: EngineClient, sent: bytes, why: str) -> None:
    connection = connected_worker(pool)
    post = pool.submit(client, ONE, SAMPLING)
    asked(connection)
    os.write(connection.fileno(), sent)
    assert list(post.result(WAIT)[0].response_ids) == [7]
    assert pool.lost == 1
    connection.close()


def test_a_post_that_rank_0_cannot_send_either_ends(pool: WorkerPool) -> None:
    class Unable(EngineClient):
        def submit(self, *given: Any, **named: Any) -> Any:
            raise ZeroDivisionError("no thread")

    connection = connected_worker(pool)
    with closing(Unable("http://127.0.0.1:9")) as client:
        post = pool.submit(client, ONE, SAMPLING)
        asked(connection)
        connection.close()
        assert isinstance(post.exception(WAIT), ZeroDivisionError)


def test_a_job_that_was_suspended_loses_no_worker(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of all its processes jumps; each worker answers as before."""
    connection, now, ahead = connected_worker(pool), time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now() + ahead[0])
    for _ in range(3):
        assert connection.recv() == PING
        ahead[0] += 3600
        assert connection.recv() == PING, "it is asked again"
        connection.send(PING)
    assert connection.recv() == PING and not pool.lost
    connection.close()


def test_a_worker_that_cannot_start_is_named_at_once(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End before it connects, as where its imports fail; the rank that started it reports that."""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: no such module' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    process = WorkerProcess(0, pool.address, pool.key, tmp_path / "rollout_worker_0.log")
    with pytest.raises(
        RunError, match=r"rollout worker 0 did not start: .*status 3: ImportError: no such module \(logs"
    ):
        pool.wait(WAIT)
    process.close()


def test_a_closed_pool_listens_no_more(pool: WorkerPool) -> None:
    """Its port is free, and the thread that accepted has ended."""
    accepts = {thread for thread in threading.enumerate() if thread.name == "workers"}
    pool.close()
    wait_until(lambda: not any(thread.is_alive() for thread in accepts))
    with pytest.raises(ConnectionRefusedError), socket.create_connection(pool.address, WAIT):
        pass


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\x14aaaaaaaaaaaaaaaaaaaa", b"\xff\xff\xff\xff"]
)
def test_strangers_are_sent_away(pool: WorkerPool, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The silent one, too: scanners would leave a thread and two files each."""
    monkeypatch.setattr(joining, "HANDSHAKE_SECONDS", 0.3)
    files = len(os.listdir("/proc/self/fd"))
    with socket.create_connection(pool.address) as stranger:
        stranger.sendall(said)
        stranger.settimeout(WAIT)
        try:
            while stranger.recv(4096):
                pass
        except ConnectionResetError:
            pass  # it had more to send
    wait_until(lambda: all(thread.name != "worker" for thread in threading.enumerate()))
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= files)


def test_a_worker_ends_with_its_rank_though_a_fork_of_it_lives(pool: WorkerPool, tmp_path: Path) -> None:
    """The fork, as of a checkpoint's writer, has the rank's files, so that none of them ends."""
    script = (
        "import os, sys, time\nfrom pathlib import Path\nfrom owpo_megatron.workers import WorkerProcess\n"
        "key, log = bytes.fromhex(sys.argv[2]), Path(sys.argv[3])\n"
        "worker = WorkerProcess(0, ('127.0.0.1', int(sys.argv[1])), key, log)\n"
        "fork = os.fork()\nif fork: print(worker.process.pid, fork, flush=True)\ntime.sleep(600)"
    )
    command = [sys.executable, "-c", script, str(pool.address[1]), pool.key.hex(), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as rank:
        assert rank.stdout is not None
        worker, fork = map(int, rank.stdout.readline().split())
        pool.wait(2 * WAIT)
        rank.kill()
        try:
            wait_until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == "zombie")
        finally:
            os.kill(fork, signal.SIGKILL)


def test_signals_to_a_whole_job_and_the_end_of_its_rank_are_no_loss(
    pool: WorkerPool, client: EngineClient, tmp_path: Path
) -> None:
    """The run decides when its workers end. One that ends with its rank reports that, and others take its posts."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        process = WorkerProcess(0, pool.address, pool.key, tmp_path / "rollout_worker_0.log")
        pool.wait(2 * WAIT)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(process.process.pid, number)
        assert list(pool.submit(client, ONE, SAMPLING).result(WAIT)[0].response_ids) == [7]
        with closing(EngineClient(f"http://127.0.0.1:{mute.getsockname()[1]}")) as silent:
            post = pool.submit(silent, ONE, SAMPLING)
            of_worker, _ = mute.accept()
            process.close()
            of_rank_0, _ = mute.accept()
            assert process.process.returncode == 0 and not post.done()
            of_worker.close()
            of_rank_0.close()
    assert not pool.lost and not pool.lines  # type: ignore[attr-defined]
