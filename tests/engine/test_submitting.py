"""Requests on the event loop: they cost no threads, and their errors are those of requests that are waited for.

With a server in a thread of this process; tests/engine/test_engine.py has a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from blocking_sampler import BlockingSampler

from owpo_megatron.engine import loop
from owpo_megatron.engine.client import EngineClient
from owpo_megatron.engine.generation import Generation
from owpo_megatron.engine.replies import EngineGone, EngineWrong
from owpo_megatron.errors import EngineError
from owpo_megatron.types import Prompt, Rollout, SampleRequest, Sampling

WAIT = 30
ONE = [SampleRequest(Prompt("p", (1, 2), "", ""), 5)]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def answer(status: int = 200, **changed: Any) -> web.Response:
    meta = {"output_token_logprobs": [[-0.5, 7, None]], "finish_reason": {"type": "stop"}, "weight_version": "3"}
    return web.json_response({"output_ids": [7], "meta_info": meta} | changed, status=status)


@contextlib.contextmanager
def serving(handler: Handler) -> Iterator[str]:
    """URL of a server that answers every request by `handler`, in one thread."""
    serving_loop, port = asyncio.new_event_loop(), Future[int]()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
        port.set_result(runner.addresses[0][1])
        return runner

    def run() -> None:
        runner = serving_loop.run_until_complete(start())
        serving_loop.run_forever()
        serving_loop.run_until_complete(runner.cleanup())
        serving_loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port.result(WAIT)}"
    finally:
        serving_loop.call_soon_threadsafe(serving_loop.stop)
        thread.join(WAIT)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize("in_flight", [10, 300])
def test_requests_in_flight_share_one_thread(in_flight: int) -> None:
    before, while_waiting, asked, full = threads(), set[str](), 0, asyncio.Event()

    async def hold(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        if asked == in_flight:
            while_waiting.update(threads())
            full.set()
        await asyncio.wait_for(full.wait(), WAIT)
        return answer()

    requests = [SampleRequest(ONE[0].prompt, seed) for seed in range(2 * in_flight)]
    with serving(hold) as url, contextlib.closing(EngineClient(url)) as client:
        found = Generation(
            [client], requests, Sampling(4), samples_per_post=1, concurrency=in_flight, give_up=lambda engine: None,
            bring_back=lambda engine, error: None,
        ).run()  # fmt: skip
        servers = {name for name in while_waiting - before if name != "engine-requests"}
        assert "engine-requests" in while_waiting and len(servers) == 1, while_waiting
    assert [rollout.seed for rollout in found] == list(range(2 * in_flight))
    others = "engine-requests" in before  # another test's client is still open
    assert others or "engine-requests" not in threads(), "the loop ends with the last client"


class FailsLater(BlockingSampler):
    """Its second request cannot be submitted; it would come out of the first one's callback."""

    calls = 0

    def submit(self, *given: Any, **named: Any) -> Future[list[Rollout]]:
        self.calls += 1
        if self.calls == 2:
            raise ZeroDivisionError("in a callback")
        return super().submit(*given, **named)

    def generate(self, requests: Any, *given: Any) -> list[Rollout]:
        return [Rollout(one.prompt, (1,), (-0.5,), 0, "stop", one.seed) for one in requests]


def test_an_error_in_a_callback_ends_the_generation() -> None:
    with pytest.raises(ZeroDivisionError, match="in a callback"):
        Generation(
            [FailsLater()], ONE * 3, Sampling(4), samples_per_post=1, concurrency=1, give_up=lambda engine: None,
            bring_back=lambda engine, error: None,
        ).run()  # fmt: skip


def test_answers_that_are_there_at_once_do_not_nest() -> None:
    class AtOnce(FailsLater):
        def submit(self, *given: Any, **named: Any) -> Future[list[Rollout]]:
            future = Future[list[Rollout]]()
            future.set_result(self.generate(*given))
            return future

    found = Generation(
        [AtOnce()], ONE * 5000, Sampling(4), samples_per_post=1, concurrency=2, give_up=lambda engine: None,
        bring_back=lambda engine, error: None,
    ).run()  # fmt: skip
    assert len(found) == 5000


def fails(client: EngineClient) -> tuple[EngineError, EngineError]:
    """The error of a request on the loop, and of one that is waited for."""
    found = client.submit(ONE, Sampling(4)).exception(WAIT)
    assert isinstance(found, EngineError)
    with pytest.raises(EngineError) as told:
        client._post("/generate", {}, timeout=client.request_timeout)
    return found, told.value


async def silent(request: web.Request) -> web.Response:
    await asyncio.sleep(WAIT)
    return answer()


async def torn(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    response = web.StreamResponse(headers={"content-length": "100"})
    await response.prepare(request)
    request.transport.abort()
    return response


async def failing(request: web.Request) -> web.Response:
    return answer(500, error={"message": "no memory"})


async def refusing(request: web.Request) -> web.Response:
    return answer(400, message="too long")


async def busy(request: web.Request) -> web.Response:
    return web.Response(status=503, text="later")


@pytest.mark.parametrize(
    ("handler", "kind", "words", "same"),
    [
        (silent, EngineGone, "/generate did not answer within 0.3 s", True),
        (torn, EngineGone, "/generate is not reachable: ", False),
        (failing, EngineGone, "/generate failed with 500: no memory", True),
        (refusing, EngineError, "/generate refused with 400: too long", True),
        (busy, EngineGone, "/generate failed with 503: later", True),
        (None, EngineGone, "/generate is not reachable: [Errno 111] Connection refused", True),
    ],
)
def test_errors_are_those_of_requests_that_are_waited_for(
    handler: Handler | None, kind: type, words: str, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Word for word, except for the two HTTP libraries' words for an answer that breaks off."""
    for module in ("loop", "connection"):
        monkeypatch.setattr(f"owpo_megatron.engine.{module}.BACK_OFF", (0.0, 0.0))
    with contextlib.ExitStack() as stack:
        url = "http://127.0.0.1:9" if handler is None else stack.enter_context(serving(handler))
        client = stack.enter_context(contextlib.closing(EngineClient(url, request_timeout=0.3)))
        found, told = fails(client)
    assert type(found) is type(told) is kind and str(found).startswith(f"engine {url}{words}")
    assert str(found) == str(told) or not same


def test_a_connection_that_takes_long_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's queue of new connections is full. Its time is not that of an answer."""
    monkeypatch.setattr(loop, "CROWD_SECONDS", 0.5)
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(8):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}"
        client = stack.enter_context(contextlib.closing(EngineClient(url)))
        error = client.submit(ONE, Sampling(4)).exception(WAIT)
    assert isinstance(error, EngineGone)
    assert str(error) == f"engine {url}/generate is not reachable: no connection within 0.5 s"


def test_a_busy_server_is_asked_again_and_a_wrong_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not through a proxy."""
    monkeypatch.setattr(loop, "BACK_OFF", (0.0, 0.0))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    statuses = [429, 503, 200, 200]

    async def handler(request: web.Request) -> web.Response:
        if (status := statuses.pop(0)) in loop.BUSY:
            return web.Response(status=status)
        return answer(output_ids=[7] if statuses else [8])

    with serving(handler) as url, contextlib.closing(EngineClient("http://127.0.0.1:9")) as client:
        client.connect(url)
        assert client.generate(ONE, Sampling(4))[0].response_ids == (7,)
        with pytest.raises(EngineWrong, match=f"engine {url}/generate answered .* do not belong together"):
            client.generate(ONE, Sampling(4))


def test_what_is_in_flight_ends_with_its_client() -> None:
    """End by an error of its own; other clients' requests go on."""
    asked, may_answer = threading.Event(), threading.Event()

    async def handler(request: web.Request) -> web.Response:
        asked.set()
        while not may_answer.is_set():
            await asyncio.sleep(0.01)
        return answer()

    with serving(handler) as url, contextlib.closing(EngineClient(url)) as other:
        client = EngineClient(url)
        pending, kept = client.submit(ONE, Sampling(4)), other.submit(ONE, Sampling(4))
        cancelled = other.submit(ONE, Sampling(4))
        assert asked.wait(WAIT) and cancelled.cancel()
        client.close()
        late = client.submit(ONE, Sampling(4))
        for future in (pending, late):
            with pytest.raises(EngineGone, match="/generate was given up: the client is closed"):
                future.result(WAIT)
        may_answer.set()
        assert kept.result(WAIT)[0].response_ids == (7,)
    client.close()


def test_two_threads_may_close_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one while the first waits: neither waits for a loop that the other has ended."""
    end, ends, both = loop.Channel._end, [], threading.Event()

    async def slow_end(channel: loop.Channel) -> None:
        ends.append(channel)
        while not both.is_set():
            await asyncio.sleep(0.01)
        await end(channel)

    monkeypatch.setattr(loop.Channel, "_end", slow_end)
    with serving(at_once) as url:
        client = EngineClient(url)
        client.generate(ONE, Sampling(4))
        closing = [threading.Thread(target=client.close) for _ in range(2)]
        for thread in closing:
            thread.start()
        threading.Timer(0.3, both.set).start()
        for thread in closing:
            thread.join(WAIT)
        assert not any(thread.is_alive() for thread in closing) and len(ends) == 1


async def at_once(request: web.Request) -> web.Response:
    return answer()


@pytest.mark.process
def test_a_forked_process_has_a_loop_of_its_own() -> None:
    with serving(at_once) as url, contextlib.closing(EngineClient(url)) as client:
        client.generate(ONE, Sampling(4))
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                drawn = client.submit(ONE, Sampling(4)).result(WAIT)
                client.close()
                os._exit(0 if drawn[0].response_ids == (7,) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert client.generate(ONE, Sampling(4))[0].response_ids == (7,), "the parent's connections are left alone"


@pytest.mark.process
def test_a_program_may_end_with_its_client_open(tmp_path: Path) -> None:
    """End without a warning, with one request answered and another in flight."""
    script = tmp_path / "ends.py"
    script.write_text(
        "import sys\n"
        "from owpo_megatron.engine.client import EngineClient\n"
        "from owpo_megatron.types import Prompt, SampleRequest, Sampling\n"
        "client, one = EngineClient(sys.argv[1]), [SampleRequest(Prompt('p', (1, 2), '', ''), 5)]\n"
        "print(list(client.generate(one, Sampling(4))[0].response_ids))\n"
        "client.submit(one, Sampling(4))\n"
    )
    asked = 0

    async def once(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        if asked > 1:
            await asyncio.sleep(WAIT)
        return answer()

    with serving(once) as url:
        command = [sys.executable, "-W", "always::ResourceWarning", str(script), url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=2 * WAIT)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == "[7]\n"
