"""Generations whose requests come out of earlier responses: sessions stay with an engine, a lost engine loses no turn.

With clients that answer in their threads; a real server has the turns of tests/e2e/test_episode_runs.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pytest
from blocking_sampler import BlockingSampler

from owpo_megatron.engine.client import EngineGone
from owpo_megatron.engine.generation import Generation
from owpo_megatron.errors import EngineError
from owpo_megatron.types import Prompt, Rollout, SampleRequest, Sampling

TURNS, SESSIONS = 4, 12


class Client(BlockingSampler):
    """Answers with the length of the context; dies at its `dies_at`-th call."""

    def __init__(self, name: str, dies_at: int | None = None):
        self.url, self.incarnation = name, 0
        self.served: list[int] = []  # sessions, in order
        self._dies_at, self._calls, self._lock = dies_at, 0, threading.Lock()

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling, version: int | None) -> list[Rollout]:
        with self._lock:
            self._calls += 1
            if self._calls == self._dies_at:
                raise EngineGone(self.url, " is gone")
        time.sleep(0.001 * (requests[0].seed % 3))
        with self._lock:
            self.served += [request.session for request in requests if request.session is not None]
        return [Rollout(one.prompt, (len(one.prompt.token_ids),), (0.0,), 0, "stop", one.seed) for one in requests]


class Conversations:
    """Feed of SESSIONS conversations of TURNS turns; each next turn comes from a thread, after a while."""

    expected = SESSIONS

    def __init__(self) -> None:
        self.turns: dict[int, list[tuple[int, ...]]] = {session: [] for session in range(SESSIONS)}
        self._ready: list[SampleRequest] = []
        self._under_way: list[SampleRequest] = []
        self._thinking, self._lock = 0, threading.Lock()

    def begin(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        for session in range(SESSIONS):
            self._think(session, (session,))

    def take(self) -> list[SampleRequest]:
        with self._lock:
            taken, self._ready = self._ready, []
            self._thinking -= len(taken)
        self._under_way += taken
        return taken

    def goes_on(self) -> bool:
        return self._thinking > 0

    def heard(self, first: int, rollouts: Sequence[Rollout]) -> None:
        for request, rollout in zip(self._under_way[first : first + len(rollouts)], rollouts, strict=True):
            assert rollout.prompt is request.prompt, "responses come with the number of their request"
            assert request.session is not None
            own = self.turns[request.session]
            own.append(rollout.response_ids)
            if len(own) < TURNS:
                self._think(request.session, (*request.prompt.token_ids, *rollout.response_ids))

    def _think(self, session: int, context: tuple[int, ...]) -> None:
        with self._lock:
            self._thinking += 1
        request = SampleRequest(Prompt("p", context, "", ""), seed=session, session=session)

        def ready() -> None:
            with self._lock:
                self._ready.append(request)
            self._wake()

        threading.Timer(0.002 * (session % 4), ready).start()


def converse(clients: list[Client], per_post: int = 3, restarts: int = 1) -> Conversations:
    feed = Conversations()

    def bring_back(engine: int, error: EngineGone) -> None:
        nonlocal restarts
        if not restarts:
            raise EngineError(f"{error}, once too often")
        restarts -= 1
        clients[engine].incarnation += 1

    Generation(
        clients, [], Sampling(4), samples_per_post=per_post, concurrency=4 * per_post,
        give_up=lambda engine: None, bring_back=bring_back, finished=feed.heard, feed=feed,
    ).run()  # fmt: skip
    return feed


EXPECTED = {session: [(1,), (2,), (3,), (4,)] for session in range(SESSIONS)}


@pytest.mark.parametrize("per_post", [1, 3, 64])
def test_every_session_has_its_turns_in_order_at_one_engine(per_post: int) -> None:
    clients = [Client("one"), Client("two")]
    assert converse(clients, per_post).turns == EXPECTED
    homes = [set(client.served) for client in clients]
    assert not homes[0] & homes[1] and homes[0] | homes[1] == set(range(SESSIONS))


@pytest.mark.parametrize("dies_at", [1, 2, 5])
def test_an_engine_that_is_lost_costs_no_turn(dies_at: int) -> None:
    clients = [Client("one", dies_at), Client("two")]
    assert converse(clients, per_post=1).turns == EXPECTED


def test_an_engine_that_stays_dead_ends_the_generation() -> None:
    with pytest.raises(EngineError, match="one is gone, once too often"):
        converse([Client("one", 2)], per_post=1, restarts=0)
