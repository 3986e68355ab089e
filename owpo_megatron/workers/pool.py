"""Rollout workers as global rank 0 sees them: it listens, they connect, each post goes to the least busy one."""

from __future__ import annotations

import itertools
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace

from owpo_megatron.engine.client import EngineClient
from owpo_megatron.errors import EngineError, RunError
from owpo_megatron.types import Rollout, SampleRequest, Sampling
from owpo_megatron.workers.client import WorkersClient
from owpo_megatron.workers.joining import listen, welcome
from owpo_megatron.workers.member import Member, Post
from owpo_megatron.workers.messages import Answer, Ask, GradingOrder, Ready, Server


class WorkerPool:
    """Workers of a run. Safe to use from any thread.

    A worker that is lost (its process ended, its node is gone, it does not answer) is reported; its posts go to the
    others, and to this process while there is none. One that comes back takes posts again.

    Args:
        host: address of this machine that the workers can reach.
        count: workers to wait for.
        order: what they grade with; None: nothing.
        notify: called with a line for each worker that is lost or comes back.
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
        self._joined: set[int] = set()  # workers that have been ready, by their numbers
        self._failures: list[str] = []
        self._closed = False
        self._numbers = itertools.count()
        self._change = threading.Condition()  # guards all of these
        self._server = listen(host, backlog=count)
        address, port = self._server.getsockname()[:2]
        self.address = str(address), int(port)
        """Host and port where workers have to connect."""
        threading.Thread(target=self._accept, name="workers", daemon=True).start()

    def wait(self, seconds: float) -> None:
        """Return when all workers take posts.

        Raises:
            RunError: one of them cannot, or is not there in time.
        """
        with self._change:
            self._change.wait_for(lambda: self._failures or len(self._joined) == self._count, seconds)
            failures, missing = self._failures, sorted(set(range(self._count)) - self._joined)
        if failures:
            raise RunError(failures[0])
        if missing:
            one, which = (
                (f"rollout worker {missing[0]}", missing[0])
                if len(missing) == 1
                else (f"{len(missing)} of {self._count} rollout workers ({', '.join(map(str, missing[:8]))})", "N")
            )
            raise RunError(
                f"{one} did not answer at {self.address[0]} within {seconds:g} s (engine.startup_timeout; "
                f"logs/rollout_worker_{which}.log); rollout.workers=0 goes without"
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
        """Let the workers end; posts under way fail by EngineError: no engine is to blame."""
        with self._change:
            self._closed = True
            members, self._members = self._members, []
            posts = [post for member in members for post in member.posts.values()]
            for member in members:
                member.posts = {}
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts, which closes it
        for member in members:
            member.hang_up()
        for post in posts:
            post.result.set_exception(EngineError("samples were given up: the rollout workers are closed"))

    def _hand_out(self, post: Post) -> None:
        """Never waits: engines' answers are read by the threads that come here."""
        with self._change:
            member = min(self._members, key=lambda one: one.load, default=None)
            if member is not None:
                number = next(self._numbers)
                member.posts[number] = post
        if member is not None:
            ask = Ask(number, Server.of(post.client), post.requests, post.sampling, post.version, post.names)
            member.send(ask)
            return
        try:
            drawn = post.client.submit(post.requests, post.sampling, post.version, post.names)
        except Exception as error:
            post.result.set_exception(error)
        else:
            _copy(drawn, post.result)

    def _settle(self, member: Member, answer: Answer) -> None:
        with self._change:
            post = member.posts.pop(answer.number, None)
        if post is None:
            return  # the pool was closed meanwhile
        if answer.error is not None:
            post.result.set_exception(answer.error)
        elif len(answer.rollouts) != len(post.requests):
            what = f"{len(answer.rollouts)} rollouts for {len(post.requests)} requests"
            post.result.set_exception(RunError(f"rollout worker {member.index} sent {what}"))
        else:
            pairs = zip(answer.rollouts, post.requests, strict=True)
            post.result.set_result([replace(one, prompt=request.prompt) for one, request in pairs])

    def _part(self, member: Member, why: str | None) -> None:
        """Give the posts of a worker that is gone to the others.

        Args:
            why: how it was lost; None: it has taken its leave.
        """
        with self._change:
            if member not in self._members:
                return  # the pool is closed
            self._members.remove(member)
            left = len(self._members)
            posts, member.posts = list(member.posts.values()), {}
            self.lost += why is not None
        try:
            if why is not None:
                others = f"its responses go to the other {left}" if left else "rank 0 asks for responses itself"
                self.notify(f"rollout worker {member.index} is lost ({why}); {others}")
        finally:
            for post in posts:
                self._hand_out(post)

    # ------------------------------------------------------------------------------------------ connections
    def _accept(self) -> None:
        with self._server:
            while True:
                try:
                    line, _ = self._server.accept()
                except OSError:
                    if self._closed:
                        return
                    time.sleep(0.1)  # too many open files, or whoever called has gone
                    continue
                threading.Thread(target=self._serve, args=(line,), name="worker", daemon=True).start()

    def _serve(self, line: socket.socket) -> None:
        """Serve a connection, in its own thread: a stranger who is silent keeps nobody waiting."""
        with line:
            try:
                connection, index = welcome(line, self.key)
            except Exception:  # whatever a stranger sends
                return
            try:
                connection.send(self._order)
                ready: Ready = connection.recv()
            except Exception:
                ready = Ready("its process has ended")
            member = Member(index, connection, line)
            if not self._enter(member, ready):
                connection.close()
                return
            self._part(member, member.listen(lambda answer: self._settle(member, answer)))

    def _enter(self, member: Member, ready: Ready) -> bool:
        """Take a worker in, unless it cannot work, or is the word of one that has ended (handle.py)."""
        with self._change:
            takes = not ready.failure and not self._closed
            returns = takes and member.index in self._joined
            if takes:
                self._members.append(member)
                self._joined.add(member.index)
            elif ready.failure and member.index not in self._joined:
                log = f"logs/rollout_worker_{member.index}.log"
                self._failures.append(f"rollout worker {member.index} did not start: {ready.failure} ({log})")
            self._change.notify_all()
        if returns:
            self.notify(f"rollout worker {member.index} is back")
        return takes


def _copy(source: Future[list[Rollout]], target: Future[list[Rollout]]) -> None:
    def copied(done: Future[list[Rollout]]) -> None:
        try:
            target.set_result(done.result())
        except BaseException as error:  # cancelled, too: someone waits for the target
            target.set_exception(error)

    source.add_done_callback(copied)
