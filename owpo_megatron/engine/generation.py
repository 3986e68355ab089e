"""Implementation of one call of `Fleet.generate`.

    calling thread                       worker threads (a few per engine)
        groups samples into posts  --->      take a post, POST /generate, queue the outcome
        collects outcomes, progress  <---    ... until no post is left, or their engine is lost
        revives a lost engine, restarts its workers

Engines are revived in the calling thread, since a push of weights may be collective over trainer ranks. A lost post is
drawn again with the same seeds, and so gives the same tokens.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from owpo_megatron.engine.client import EngineClient, EngineGone
from owpo_megatron.types import Finished, Progress, Rollout, SampleRequest, Sampling

# A post returns when its longest sample ends. Short samples share a post, which saves most of the time with a small
# model; long ones get a post of their own, so that none waits for another.
TOKENS_PER_POST = 4096
SAMPLES_PER_POST = 64


@dataclass(frozen=True)
class Outcome:
    """Result of a worker: rollouts, an error, or its end."""

    engine: int
    incarnation: int  # of the engine that was asked
    first: int | None = None  # first sample of the post; None: no post was left
    result: list[Rollout] | Exception | None = None


class Generation:
    """Distributes the samples of `requests` among engines.

    Args:
        clients: the engines, or the one router in front of them.
        samples_per_post: samples sent in one request.
        concurrency: samples in flight per client.
        give_up: makes the pending requests of a lost engine (its index in `clients`) fail quickly.
        bring_back: returns when a lost engine answers again and has the weights.
        version: weights that must draw the samples, by their version; None: any.
    """

    def __init__(
        self,
        clients: Sequence[EngineClient],
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        *,
        samples_per_post: int,
        concurrency: int,
        give_up: Callable[[int], None],
        bring_back: Callable[[int, EngineGone], None],
        version: int | None = None,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ):
        self.clients, self.requests, self.sampling = clients, requests, sampling
        self.samples_per_post = samples_per_post
        self.give_up, self.bring_back = give_up, bring_back
        self.version = version
        self.progress, self.finished = progress, finished
        self.posts = deque(range(0, len(requests), samples_per_post))  # each by its first sample
        self.workers_per_engine = max(1, concurrency // samples_per_post)
        self.workers = [0] * len(clients)
        self.lost: dict[int, EngineGone] = {}
        self.outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

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
                        self.give_up(engine)
                    elif engine not in self.lost:
                        self._start_workers(engine, 1)  # it was revived together with another engine
                elif result is not None:
                    raise result
                if engine in self.lost and self.workers[engine] == 0:
                    self.bring_back(engine, self.lost.pop(engine))
                    self._start_workers(engine)
        finally:
            self.posts.clear()  # workers of an interrupted call end after their current post
        return rollouts  # type: ignore[return-value]

    def _start_workers(self, engine: int, most: int | None = None) -> None:
        count = min(most or self.workers_per_engine, len(self.posts))
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
                self.outcomes.put(Outcome(engine, incarnation))
                return
            try:
                requests = self.requests[first : first + self.samples_per_post]
                rollouts = client.generate(requests, self.sampling, self.version)
            except Exception as error:
                self.outcomes.put(Outcome(engine, incarnation, first, error))
                return
            self.outcomes.put(Outcome(engine, incarnation, first, rollouts))


def samples_per_post(num_samples: int, num_engines: int, sampling: Sampling) -> int:
    """Return the number of samples to send in one POST."""
    by_tokens = max(1, TOKENS_PER_POST // sampling.max_tokens)
    return min(SAMPLES_PER_POST, by_tokens, -(-num_samples // num_engines))
