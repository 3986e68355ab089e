"""Rollout workers as global rank 0 sees them: it listens, they connect, each post goes to the least busy one."""

from __future__ import annotations

import itertools
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

from owpo_megatron.engine.client import EngineClient
from owpo_megatron.engine.replies import EngineGone
from owpo_megatron.errors import RunError
from owpo_megatron.types import Rollout, SampleRequest, Sampling
from owpo_megatron.workers.client import WorkersClient
from owpo_megatron.workers.messages import PING, Answer, Ask, GradingOrder, Ready, Server

PING_SECONDS = 10.0  # without a message before a worker is asked whether it is there
SILENT_SECONDS = 120.0  # without a message before it is taken for lost


@dataclass(frozen=True)
class Post:
    """Arguments of `submit`, and the future of its result."""

    client: EngineClient
    requests: Sequence[SampleRequest]
    sampling: Sampling
    version: int | None
    names: Sequence[str] | None
    result: Future[list[Rollout]]


@dataclass(eq=False)
class Member:
    """A worker that is there."""

    index: int
    connection: Connection  # over a duplicate of the socket
    socket: socket.socket
    posts: dict[int, Post] = field(default_factory=dict)  # under way, by number
    sending: threading.Lock = field(default_factory=threading.Lock)

    @property
    def load(self) -> int:
        """Samples under way."""
        return sum(len(post.requests) for post in self.posts.values())

    def send(self, message: object) -> None:
        with self.sending:
            self.connection.send(message)

    def hang_up(self) -> None:
        """End the connection for both sides, at once: a file that a thread waits for is not closed until it returns."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class WorkerPool:
    """Workers of a run. Safe to use from any thread.

    A worker that is lost (its process ended, its node is gone, it does not answer) is reported; its posts go to the
    others, and to this process when none is left.

    Args:
        host: address of this machine that the workers can reach.
        count: workers to wait for.
        order: what they grade with; None: nothing.
        notify: called with a line for each worker that is lost.
    """

    def __init__(
        self,
        host: str,
        count: int,
        order: GradingOrder | None = None,
        notify: Callable[[str], None] = lambda text: None,
    ):
        self._count, self._order = count, order
        self.notify = notify
        self.key = secrets.token_bytes(32)
        """Has to be given to each worker, by a way that nobody else reads."""
        self.lost = 0
        """Workers that were lost so far."""
        self._members: list[Member] = []
        self._failures: list[str] = []
        self._numbers = itertools.count()
        self._change = threading.Condition()  # guards all of these
        self._server = socket.create_server((host, 0), backlog=count)
        threading.Thread(target=self._accept, name="workers", daemon=True).start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port where workers have to connect."""
        host, port = self._server.getsockname()[:2]
        return str(host), int(port)

    def wait(self, seconds: float) -> None:
        """Return when all workers take posts.

        Raises:
            RunError: one of them cannot, or is not there in time.
        """
        with self._change:
            here = self._change.wait_for(lambda: self._failures or len(self._members) == self._count, seconds)
            missing = self._count - len(self._members)
        if self._failures:
            raise RunError(f"a rollout worker did not start: {self._failures[0]} (logs/rollout_worker_N.log)")
        if not here:
            raise RunError(
                f"{missing} of {self._count} rollout workers did not connect to {self.address[0]} within "
                f"{seconds:g} s (logs/rollout_worker_N.log of their node); rollout.workers=0 goes without"
            )

    def over(self, client: EngineClient) -> WorkersClient:
        """The client, whose requests are sent by these workers."""
        return WorkersClient(client, self)

    def submit(
        self,
        client: EngineClient,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        version: int | None = None,
        names: Sequence[str] | None = None,
    ) -> Future[list[Rollout]]:
        """Have a post sent. Its future has what EngineClient.submit's has, or the RunError of a worker."""
        post = Post(client, requests, sampling, version, names, Future())
        self._hand_out(post)
        return post.result

    def close(self) -> None:
        """Let the workers end; posts under way fail by EngineGone."""
        with self._change:
            members, self._members = self._members, []
            posts = [post for member in members for post in member.posts.values()]
            for member in members:
                member.posts = {}
        self._server.close()
        for member in members:
            member.hang_up()
        for post in posts:
            post.result.set_exception(EngineGone(post.client.url, " was given up: the workers are closed"))

    def _hand_out(self, post: Post) -> None:
        with self._change:
            member = min(self._members, key=lambda one: one.load, default=None)
            if member is not None:
                number = next(self._numbers)
                member.posts[number] = post
        if member is None:
            _copy(post.client.submit(post.requests, post.sampling, post.version, post.names), post.result)
            return
        ask = Ask(number, Server.of(post.client), post.requests, post.sampling, post.version, post.names)
        try:
            member.send(ask)
        except OSError as error:
            self._lose(member, str(error))

    def _settle(self, member: Member, answer: Answer) -> None:
        with self._change:
            post = member.posts.pop(answer.number, None)
        if post is None:
            return  # the worker was taken for lost meanwhile
        if answer.error is not None:
            post.result.set_exception(answer.error)
            return
        pairs = zip(answer.rollouts, post.requests, strict=True)
        post.result.set_result([replace(one, prompt=request.prompt) for one, request in pairs])

    def _lose(self, member: Member, why: str) -> None:
        """Give a worker's posts to the others, once."""
        with self._change:
            if member not in self._members:
                return
            self._members.remove(member)
            left = len(self._members)
            posts, member.posts = list(member.posts.values()), {}
            self.lost += 1
        member.hang_up()
        others = f"its responses go to the other {left}" if left else "rank 0 asks for responses itself from now on"
        self.notify(f"rollout worker {member.index} is lost ({why}); {others}")
        for post in posts:
            self._hand_out(post)

    # ------------------------------------------------------------------------------------------ connections
    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._server.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._welcome, args=(accepted,), name="worker", daemon=True).start()

    def _welcome(self, accepted: socket.socket) -> None:
        """Serve a connection, in its own thread: a stranger who is silent keeps nobody waiting."""
        connection = Connection(os.dup(accepted.fileno()))
        try:
            deliver_challenge(connection, self.key)
            answer_challenge(connection, self.key)
        except (AuthenticationError, EOFError, OSError):
            connection.close()  # no worker of this run
            accepted.close()
            return
        try:
            index = connection.recv()
            connection.send(self._order)
            ready: Ready = connection.recv()
        except (EOFError, OSError):
            ready, index = Ready("it ended before it was ready"), "?"
        member = Member(index, connection, accepted)
        with self._change:
            if ready.failure:
                self._failures.append(ready.failure)
            else:
                self._members.append(member)
            self._change.notify_all()
        if not ready.failure:
            self._listen(member)

    def _listen(self, member: Member) -> None:
        heard = time.monotonic()
        try:
            while True:
                if member.connection.poll(PING_SECONDS):
                    message = member.connection.recv()
                    heard = time.monotonic()
                    if isinstance(message, Answer):
                        self._settle(member, message)
                elif time.monotonic() - heard > SILENT_SECONDS:
                    raise TimeoutError(f"silent for {SILENT_SECONDS:g} s")
                else:
                    member.send(PING)
        except EOFError:
            self._lose(member, "its process has ended")
        except OSError as error:
            self._lose(member, str(error))
        finally:
            member.connection.close()


def _copy(source: Future[list[Rollout]], target: Future[list[Rollout]]) -> None:
    def copied(done: Future[list[Rollout]]) -> None:
        error = done.exception()
        if error is not None:
            target.set_exception(error)
        else:
            target.set_result(done.result())

    source.add_done_callback(copied)
