"""One event loop in one thread that carries all requests for samples of a process, however many are in flight.

    any thread                          the loop's thread
        Channel.post  -------------->      POST, ask a busy server again, parse and check the answer
        Future  <--------------------      ... its callbacks run here: they must not wait

The loop starts with the first post, and ends with the last channel that has posted. A process that is forked off does
not have the thread: its first post starts a loop of its own.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import resource
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from owpo_megatron.engine.replies import BACK_OFF, BUSY, EngineGone, answer_of, silent, unconnected, unreachable

if TYPE_CHECKING:
    import aiohttp

T = TypeVar("T")

# uvicorn closes a connection after 5 s of idleness: drop it earlier, or a request may hit a closing socket.
KEEPALIVE_SECONDS = 2.0
# For samples, whose connections are opened by the thousand: where the server's queue of them is full, the system tries
# again after 1, 3, 7, 15 and 31 s. A lost engine would be restarted.
CROWD_SECONDS = 60.0
OPEN_FILES = 65_536  # a connection for each request in flight; the usual limit is 1,024
END_SECONDS = 30.0


class Channel:
    """A client's requests on the loop. Thread-safe."""

    def __init__(self) -> None:
        self._closed = False
        self._tasks: set[asyncio.Task[Any]] = set()  # of the loop's thread alone, as the session
        self._session: aiohttp.ClientSession | None = None
        self._ended: Future[None] | None = None  # once it is closed

    def post(
        self,
        url: str,
        path: str,
        content: bytes,
        headers: Mapping[str, str],
        timeout: float,
        read: Callable[[Any], T],
    ) -> Future[T]:
        """POST without waiting. The future has what `read` makes of the parsed answer, or an error.

        Args:
            url: http://host:port of the server.
            timeout: seconds for each attempt, of which there are several where the server is busy.
            read: called in the loop's thread.

        Errors:
            EngineGone: the server is dead, silent or busy for long, or this channel was closed.
            EngineError: it refused, or this process may open no more connections.
        """
        with _lock:
            if not self._closed:
                exchange = self._exchange(url, path, content, headers, timeout, read)
                return asyncio.run_coroutine_threadsafe(exchange, _loop_for(self))
        refused: Future[T] = Future()
        refused.set_exception(_closed(url, path))
        return refused

    def close(self) -> None:
        """End the requests in flight, by EngineGone, and drop the connections. Not from the loop's own thread."""
        with _lock:
            first, self._closed = not self._closed, True
            running = _running if _running is not None and self in _running.channels else None
            if running is None:
                return
            if first:
                self._ended = asyncio.run_coroutine_threadsafe(self._end(), running.loop)
            ended = self._ended
        assert ended is not None
        ended.result(END_SECONDS)  # of another thread that closes it, too: the loop may end with it
        if first:
            _leave(running, self)

    def forget(self) -> None:
        """Let go of the loop of the process that this one was forked from."""
        _of_parent.append((self._session, self._tasks))
        self._session, self._tasks = None, set()

    async def _end(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
            await asyncio.sleep(0)  # its connections close in the loop's next round

    async def _exchange(
        self, url: str, path: str, content: bytes, headers: Mapping[str, str], timeout: float, read: Callable[[Any], T]
    ) -> T:
        import aiohttp  # here: programs that draw nothing start without it

        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        limits = aiohttp.ClientTimeout(total=timeout, connect=min(timeout, CROWD_SECONDS))
        if self._session is None:
            self._session = _new_session()
        session = self._session

        async def send() -> tuple[int, bytes]:
            options: dict[str, Any] = {"headers": headers, "timeout": limits, "allow_redirects": False}
            async with session.post(url + path, data=content, **options) as response:
                return response.status, await response.read()

        try:
            status, answer = await send()
            for pause in BACK_OFF:
                if status not in BUSY:
                    break
                await asyncio.sleep(pause)
                status, answer = await send()
        except aiohttp.ConnectionTimeoutError as error:
            raise unconnected(url, path, min(timeout, CROWD_SECONDS)) from error
        except asyncio.TimeoutError as error:  # noqa: UP041 - another one before Python 3.11
            raise silent(url, path, timeout) from error
        except (aiohttp.ClientError, OSError) as error:
            raise unreachable(url, path, error) from error
        except asyncio.CancelledError as error:
            if not self._closed:
                raise  # by the future's owner
            raise _closed(url, path) from error
        finally:
            self._tasks.discard(task)
        return read(answer_of(url, path, status, answer))


class _Running:
    """A loop in its thread, and the channels that it is for."""

    def __init__(self) -> None:
        self.channels: set[Channel] = set()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="engine-requests", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(END_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        finally:
            self.loop.close()


_lock = threading.Lock()  # of the two below, and of the order in which channels post and close
_running: _Running | None = None
_of_parent: list[Any] = []  # kept: its end would close connections that the two processes share


def _loop_for(channel: Channel) -> asyncio.AbstractEventLoop:
    global _running
    if _running is None:
        _allow_connections()
        _running = _Running()
    _running.channels.add(channel)
    return _running.loop


def _leave(running: _Running, channel: Channel) -> None:
    global _running
    with _lock:
        running.channels.discard(channel)
        if running.channels or _running is not running:
            return
        _running = None
    running.stop()


def _new_session() -> aiohttp.ClientSession:
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,  # no proxies: engines are on this machine or in this cluster
    )


def _allow_connections() -> None:
    """Raise the soft limit of open files as far as this process may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _closed(url: str, path: str) -> EngineGone:
    return EngineGone(url, f"{path} was given up: the client is closed")


@atexit.register
def _close_all() -> None:
    """Leave no connection to the interpreter's end, which would complain of each."""
    with _lock:
        channels = [] if _running is None else list(_running.channels)
    for channel in channels:
        with suppress(Exception):
            channel.close()


def _after_fork() -> None:
    """Let go of the loop: its thread is the parent's."""
    global _lock, _running
    for channel in () if _running is None else _running.channels:
        channel.forget()
    _of_parent.append(_running)
    _lock, _running = threading.Lock(), None


os.register_at_fork(after_in_child=_after_fork)
