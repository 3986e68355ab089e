"""Implementation of one call of `Fleet.generate`.

    calling thread                       threads of the engines' answers (one, for servers on the network)
        groups samples into posts  --->      POST /generate; when it is answered, queue the outcome
        collects outcomes, progress  <---    and submit the next post, until none is left or the engine is lost
        revives a lost engine, submits again

A lane is a post in flight and those that follow it; it has no thread. The next post is submitted where the last one
was answered, for an engine must not wait while another one is revived.

Engines are revived in the calling thread, since a push of weights may be collective over trainer ranks. A lost post is
drawn again with the same seeds, and so gives the same tokens.

A feed adds requests that come out of earlier responses: the next turns of episodes, in whatever order they are ready.

Where the caller has enough, the requests in flight are cut: engines answer them with the tokens that they have so far.
"""

from __future__ import annotations

import itertools
import queue
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from owpo_megatron.engine.answers import UNKNOWN_VERSION
from owpo_megatron.engine.posts import Post, Posts
from owpo_megatron.engine.replies import EngineGone
from owpo_megatron.engine.sampler import Sampler
from owpo_megatron.types import Feed, Finished, Progress, Rollout, SampleRequest, Sampling, TokenIds, TokenValues

# A post returns when its longest sample ends. Short samples share a post, which saves most of the time with a small
# model; long ones get a post of their own, so that none waits for another.
TOKENS_PER_POST = 4096
SAMPLES_PER_POST = 64
# Between two requests to cut the same sample, whose post may have been on its way: at first, and later.
FIRST_CUT_SECONDS, CUT_SECONDS = 0.05, 0.5


@dataclass(frozen=True)
class Outcome:
    """Result of a lane: rollouts, an error, or its end."""

    engine: int
    incarnation: int  # of the engine that was asked
    post: Post | None = None  # None: no post was left
    result: list[Rollout] | BaseException | None = None


class Generation:
    """Distributes the samples of `requests` among engines.

    Args:
        clients: the engines, or the one router in front of them.
        samples_per_post: samples sent in one request.
        concurrency: samples in flight per client.
        give_up: makes the pending requests of a lost engine (its index in `clients`) fail quickly.
        bring_back: returns when a lost engine answers again and has the weights.
        version: weights that must draw the samples, by their version; None: any.
        feed: adds requests while others are drawn; None: there are no others.
        enough: whether what has been drawn is enough, asked after each post; the rest is then cut. None: it never is.
    """

    def __init__(
        self,
        clients: Sequence[Sampler],
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
        feed: Feed | None = None,
        enough: Callable[[], bool] | None = None,
    ):
        self.clients, self.requests, self.sampling = clients, list(requests), sampling
        self.samples_per_post = samples_per_post
        self.give_up, self.bring_back = give_up, bring_back
        self.version = version
        self.progress, self.finished = progress, finished
        self.feed = feed
        self.enough = enough
        self.is_cut = False
        self.cut_pause = FIRST_CUT_SECONDS
        self.in_flight: dict[Post, tuple[int, list[str]]] = {}  # engine, and names of the samples
        self.number = itertools.count()
        self.name = uuid.uuid4().hex
        self.sessions: dict[int, int] = {}  # engine that has the prefix of a session
        self.posts = Posts()
        self.posts.add(self._posts(0))
        self.lanes_per_engine = max(1, concurrency // samples_per_post)
        self.lanes = [0] * len(clients)
        self.lost: dict[int, EngineGone] = {}
        self.outcomes: queue.SimpleQueue[Outcome | None] = queue.SimpleQueue()  # None: the feed has something

    def run(self) -> list[Rollout]:
        rollouts: list[Rollout | None] = [None] * len(self.requests)
        done = 0
        try:
            if self.feed is not None:
                self.feed.begin(lambda: self.outcomes.put(None))
            for engine, share in enumerate(first_shares(len(self.posts), len(self.lanes), self.lanes_per_engine)):
                self._open_lanes(engine, share)
            # A lost engine is brought back even where others have drawn its samples: it may answer, and wrongly.
            while done < len(self.requests) or self.lost or (self.feed is not None and self.feed.goes_on()):
                if not self.is_cut and self.enough is not None and self.enough():
                    done += self._cut_waiting(rollouts)
                    continue
                try:
                    outcome = self.outcomes.get(timeout=self.cut_pause if self.is_cut else None)
                except queue.Empty:
                    self.cut_pause = min(2 * self.cut_pause, CUT_SECONDS)
                    self._cut_in_flight()
                    continue
                if outcome is None:
                    rollouts += [None] * self._take_more()
                    continue
                engine, post, result = outcome.engine, outcome.post, outcome.result
                if isinstance(result, list):
                    assert post is not None
                    rollouts[post.first : post.end] = result
                    done += len(result)
                    self._remember(engine, post)
                    if self.finished is not None:
                        self.finished(post.first, result)
                    if self.progress is not None:
                        self.progress(done, len(self.requests))
                    continue
                self.lanes[engine] -= 1
                if isinstance(result, EngineGone):
                    assert post is not None
                    if self.is_cut:
                        self._fill(rollouts, post)
                        done += post.end - post.first
                    is_lost = outcome.incarnation == self.clients[engine].incarnation
                    if is_lost:
                        self.lost[engine] = result  # before the post can be taken: not by this engine
                    if not self.is_cut:
                        self.posts.add([post], in_front=True)
                    if is_lost:
                        self.give_up(engine)
                    elif engine not in self.lost:
                        self._open_lanes(engine, 1)  # it was revived together with another engine
                elif result is not None:
                    raise result
                elif engine not in self.lost:
                    self._open_lanes(engine, 1)  # for what the feed has added since
                if engine in self.lost and self.lanes[engine] == 0:
                    self.bring_back(engine, self.lost.pop(engine))
                    self._open_lanes(engine)
        finally:
            self.posts.clear()  # lanes of an interrupted call end after their current post
        return rollouts  # type: ignore[return-value]

    def _posts(self, first: int) -> list[Post]:
        """Posts for the requests from here on; a session's goes to the engine that has it."""
        end = len(self.requests)
        if self.feed is None:
            starts = range(first, end, self.samples_per_post)
            return [Post(start, min(start + self.samples_per_post, end)) for start in starts]
        posts: list[Post] = []
        for index in range(first, end):
            session = self.requests[index].session
            engine = None if session is None else self.sessions.get(session)
            last = posts[-1] if posts else None
            if last and last.engine == engine and last.end - last.first < self.samples_per_post:
                posts[-1] = Post(last.first, index + 1, engine)
            else:
                posts.append(Post(index, index + 1, engine))
        return posts

    def _cut_waiting(self, rollouts: list[Rollout | None]) -> int:
        """Draw nothing more: what waits for a lane is done, without a token. Returns how many samples it was."""
        self.is_cut, count = True, 0
        for post in self.posts.clear():
            self._fill(rollouts, post)
            count += post.end - post.first
        self._cut_in_flight()
        return count

    def _cut_in_flight(self) -> None:
        for engine, names in list(self.in_flight.values()):
            for name in names:
                with suppress(EngineGone):  # its lane reports it
                    self.clients[engine].cut(name)

    def _fill(self, rollouts: list[Rollout | None], post: Post) -> None:
        for index in range(post.first, post.end):
            prompt, seed = self.requests[index].prompt, self.requests[index].seed
            rollouts[index] = Rollout(prompt, TokenIds([]), TokenValues([]), UNKNOWN_VERSION, "abort", seed)
        if self.finished is not None:
            self.finished(post.first, rollouts[post.first : post.end])  # type: ignore[arg-type]

    def _remember(self, engine: int, post: Post) -> None:
        if self.feed is not None and len(self.clients) > 1:
            sessions = (request.session for request in self.requests[post.first : post.end])
            self.sessions |= {session: engine for session in sessions if session is not None}

    def _take_more(self) -> int:
        """Queue what the feed has; returns how many requests it was."""
        assert self.feed is not None
        first = len(self.requests)
        self.requests += self.feed.take()
        self.posts.add(self._posts(first))
        for engine in range(len(self.lanes)):
            if engine not in self.lost:
                self._open_lanes(engine, self.lanes_per_engine - self.lanes[engine])
        return len(self.requests) - first

    def _open_lanes(self, engine: int, most: int | None = None) -> None:
        count = max(0, min(self.lanes_per_engine if most is None else most, self.posts.of(engine)))
        self.lanes[engine] += count
        for _ in range(count):
            self._proceed(engine)

    def _proceed(self, engine: int) -> None:
        """Go on with a lane: submit its next post, or queue its end. In any thread; never waits."""
        client = self.clients[engine]
        while True:
            incarnation = client.incarnation
            post = None if engine in self.lost else self.posts.take(engine)
            if post is None:
                self.outcomes.put(Outcome(engine, incarnation))
                return
            try:
                answered = self._submit(engine, post)
            except Exception as error:
                self.in_flight.pop(post, None)
                self.outcomes.put(Outcome(engine, incarnation, post, error))
                return
            if not answered.done():
                answered.add_done_callback(partial(self._hear, engine, incarnation, post))
                return
            if not self._queue(engine, incarnation, post, answered):  # in a loop: callbacks would nest
                return

    def _submit(self, engine: int, post: Post) -> Future[list[Rollout]]:
        requests = self.requests[post.first : post.end]
        named: dict[str, list[str]] = {}
        if self.enough is not None:  # no name begins another: SGLang cuts all that begin with one
            named["names"] = [f"{self.name}-{next(self.number):09d}" for _ in requests]
            self.in_flight[post] = engine, named["names"]
        return self.clients[engine].submit(requests, self.sampling, self.version, **named)

    def _hear(self, engine: int, incarnation: int, post: Post, answered: Future[list[Rollout]]) -> None:
        """Callback of a post's future, which would log an error and forget it."""
        try:
            if self._queue(engine, incarnation, post, answered):
                self._proceed(engine)
        except BaseException as error:
            self.outcomes.put(Outcome(engine, incarnation, None, error))

    def _queue(self, engine: int, incarnation: int, post: Post, answered: Future[list[Rollout]]) -> bool:
        """Queue the outcome of a post; returns whether its lane goes on."""
        self.in_flight.pop(post, None)
        try:
            result: list[Rollout] | BaseException = answered.result()
        except BaseException as error:
            result = error
        self.outcomes.put(Outcome(engine, incarnation, post, result))
        return isinstance(result, list)


def first_shares(posts: int, engines: int, lanes: int) -> list[int]:
    """Posts that each engine begins with: equally many, so that none is idle while another has all of them.

    Example:
        >>> first_shares(10, 4, 256), first_shares(10_000, 4, 256)
        ([2, 3, 2, 3], [256, 256, 256, 256])
    """
    edges = [posts * engine // engines for engine in range(engines + 1)]
    return [min(lanes, end - start) for start, end in pairwise(edges)]


def samples_per_post(num_samples: int, num_engines: int, sampling: Sampling) -> int:
    """Return the number of samples to send in one POST."""
    by_tokens = max(1, TOKENS_PER_POST // sampling.max_tokens)
    return min(SAMPLES_PER_POST, by_tokens, -(-num_samples // num_engines))
