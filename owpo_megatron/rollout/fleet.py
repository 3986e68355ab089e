"""The rollout engine: one or several servers behind one face, with recovery of those that die or hang.

Who waits for whom in `generate`:

    calling thread                       worker threads (a few an engine)
    deals samples into posts  --->       take a post, POST /generate, hand the outcome over
    collects outcomes, progress  <---    ... until no post is left, or their engine is gone
    restarts a lost engine, has its weights pushed (`on_restart`), starts workers for it again

Restart and push happen in the calling thread, since a push may be collective over trainer ranks. A lost post is drawn
again with the same seeds, so that it gives the same tokens.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from owpo_megatron.config import EngineConfig
from owpo_megatron.errors import EngineError
from owpo_megatron.rollout.client import UNKNOWN_VERSION, EngineClient, EngineGone
from owpo_megatron.types import Finished, Progress, Rollout, SampleRequest, Sampling

# A post returns when its longest sample ends. Short samples travel together, which saves most of a small model's time;
# long ones travel alone, so that none waits for another.
TOKENS_A_POST = 4096
SAMPLES_A_POST = 64


class Engine(Protocol):
    """A server as the fleet sees it."""

    client: EngineClient

    def restart(self) -> None:
        """Make it answer again; raises EngineError when that fails."""

    def stop(self) -> None:
        """Make its pending requests fail soon."""

    def close(self) -> None: ...


class UrlEngine:
    """A server that somebody else runs: lost, it is waited for; started again by whoever runs it, it gets weights."""

    def __init__(self, url: str, config: EngineConfig):
        self.client = EngineClient(url, config.request_timeout)
        self._patience = config.startup_timeout

    def restart(self) -> None:
        deadline = time.monotonic() + self._patience
        while True:
            try:
                self.client.model_info(timeout=5.0)
                break
            except EngineGone:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        self.client.connect(self.client.url)

    def stop(self) -> None:
        pass  # not ours; its connections are given up by their time-outs

    def close(self) -> None:
        self.client.close()


class Fleet:
    """Implements RolloutEngine over `engines`, all of which must serve the same weights.

    Args:
        engines: running servers.
        config: concurrency, max_restarts (for each engine, over the fleet's life).
        on_restart: called without arguments, in the thread that called `generate` or `revive`, after a lost engine
            answers again with its initial weights; must push the current weights to it (pushing to all is fine).
        front: a router that deals out samples among the engines; None: the fleet does.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        config: EngineConfig,
        on_restart: Callable[[], None] | None = None,
        front: EngineClient | None = None,
    ):
        assert engines
        self.engines = list(engines)
        self.on_restart = on_restart
        self.front = front
        self._config = config
        self._restarts = [0] * len(engines)
        self._version: int | None = None

    @property
    def clients(self) -> list[EngineClient]:
        return [engine.client for engine in self.engines]

    def weight_versions(self) -> list[int]:
        """The weight version that each engine reports."""
        versions = [client.weight_version() for client in self.clients]
        self._version = max(versions)
        return versions

    def revive(self) -> int:
        """Restart engines that do not answer, and have their weights pushed; returns how many there were."""
        lost = self._lost()
        self._bring_back(lost, needed=self._version if self.on_restart is None else None)
        return len(lost)

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[Rollout]:
        """Draw one response a request, in submission order.

        Raises:
            EngineError: an engine refused a request, stayed dead after `max_restarts` restarts, or serves other weights
                than the rest and does not get them by `on_restart`.
        """
        if not requests:
            return []
        self.revive()
        if not self._agree() and self.on_restart is not None:
            self.on_restart()  # an update has missed one of them, or was left half-way
        if not self._agree():
            versions = self.weight_versions()
            raise EngineError(f"engines serve different weight versions {versions}; push the weights to all of them")
        return _Generation(self, requests, sampling, progress, finished).run()

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        if self.front is not None:
            self.front.close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _agree(self) -> bool:
        """Every engine has whole weights, and all the same."""
        versions = set(self.weight_versions())
        return len(versions) == 1 and UNKNOWN_VERSION not in versions

    def _lost(self) -> dict[int, EngineGone]:
        """The engines that do not answer, with what became of the question."""
        lost = {}
        for index, client in enumerate(self.clients):
            try:
                client.model_info(timeout=30.0)
            except EngineGone as error:
                lost[index] = error
        return lost

    def _bring_back(self, lost: Mapping[int, EngineGone], needed: int | None) -> None:
        """Restart engines and have the weights pushed; they must then be of version `needed`, where that is known."""
        restarted: set[int] = set()
        while lost:
            for index, error in lost.items():
                self._restart(index, error)
            restarted |= set(lost)
            try:
                if self.on_restart is not None:
                    self.on_restart()
                break
            except EngineGone:
                lost = self._lost()  # another one went while these came back
                if not lost:
                    raise
        for index in sorted(restarted):
            version = self.clients[index].weight_version()
            if needed is not None and version != needed:
                raise EngineError(
                    f"engine {index} was restarted and has weights of version {version}, but {needed} is current; "
                    "on_restart must push them"
                )

    def _restart(self, index: int, error: EngineGone) -> None:
        if self._restarts[index] >= self._config.max_restarts:
            raise EngineError(
                f"engine {index} was lost again after {self._restarts[index]} restarts (engine.max_restarts): {error}"
            ) from error
        self._restarts[index] += 1
        self.engines[index].restart()


@dataclass(frozen=True)
class _Outcome:
    """What a worker hands over: rollouts, or its end."""

    engine: int
    incarnation: int  # of the engine that was asked
    first: int | None = None  # sample of the post; None: there was no post left
    result: list[Rollout] | Exception | None = None


class _Generation:
    """One call of `Fleet.generate`."""

    def __init__(
        self,
        fleet: Fleet,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        progress: Progress | None,
        finished: Finished | None,
    ):
        self.fleet, self.requests, self.sampling, self.progress = fleet, requests, sampling, progress
        self.finished = finished
        self.clients = [fleet.front] if fleet.front is not None else fleet.clients
        # sglang-router takes no list of sampling parameters, and siblings differ by their seeds
        self.samples_a_post = (
            1 if fleet.front is not None else samples_a_post(len(requests), len(self.clients), sampling)
        )
        self.posts = deque(range(0, len(requests), self.samples_a_post))  # each by its first sample
        share = fleet._config.concurrency // len(self.clients)
        self.workers_an_engine = max(1, share // self.samples_a_post)
        self.workers = [0] * len(self.clients)
        self.lost: dict[int, EngineGone] = {}
        self.outcomes: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()

    def run(self) -> list[Rollout]:
        rollouts: list[Rollout | None] = [None] * len(self.requests)
        done = 0
        try:
            for engine in range(len(self.workers)):
                self._start_workers(engine)
            while done < len(self.requests):
                outcome = self.outcomes.get()
                engine, first, result = outcome.engine, outcome.first, outcome.result
                if isinstance(result, list):
                    assert first is not None
                    rollouts[first : first + len(result)] = result
                    done += len(result)
                    if self.finished is not None:
                        self.finished(first, result)
                    if self.progress is not None:
                        self.progress(done, len(self.requests))
                    continue
                self.workers[engine] -= 1
                if isinstance(result, EngineGone):
                    assert first is not None
                    self.posts.appendleft(first)
                    if outcome.incarnation == self.clients[engine].incarnation:
                        self.lost[engine] = result
                        self._give_up(engine)
                    elif engine not in self.lost:
                        self._start_workers(engine, 1)  # it has come back while another one was brought back
                elif result is not None:
                    raise result
                if engine in self.lost and self.workers[engine] == 0:
                    self._bring_back(engine)
                    self._start_workers(engine)
        finally:
            self.posts.clear()  # workers of an interrupted call end after their present post
        return rollouts  # type: ignore[return-value]

    def _give_up(self, engine: int) -> None:
        if self.fleet.front is None:
            self.fleet.engines[engine].stop()

    def _bring_back(self, engine: int) -> None:
        cause = self.lost.pop(engine)
        lost = {engine: cause}
        if self.fleet.front is not None:
            lost = self.fleet._lost()
            if not lost:
                raise cause  # every engine answers: it is the router that does not
        self.fleet._bring_back(lost, needed=self.fleet._version)

    def _start_workers(self, engine: int, most: int | None = None) -> None:
        count = min(most or self.workers_an_engine, len(self.posts))
        self.workers[engine] += count
        for _ in range(count):
            threading.Thread(target=self._work, args=(engine,), daemon=True).start()

    def _work(self, engine: int) -> None:
        client = self.clients[engine]
        while True:
            incarnation = client.incarnation
            try:
                first = self.posts.popleft()
            except IndexError:
                self.outcomes.put(_Outcome(engine, incarnation))
                return
            try:
                rollouts = client.generate(self.requests[first : first + self.samples_a_post], self.sampling)
            except Exception as error:
                self.outcomes.put(_Outcome(engine, incarnation, first, error))
                return
            self.outcomes.put(_Outcome(engine, incarnation, first, rollouts))


def samples_a_post(num_samples: int, num_engines: int, sampling: Sampling) -> int:
    """How many samples travel in one POST."""
    by_tokens = max(1, TOKENS_A_POST // sampling.max_tokens)
    return min(SAMPLES_A_POST, by_tokens, -(-num_samples // num_engines))
