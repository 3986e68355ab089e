"""Episodes as responses: an engine whose samples go through turns with an environment.

                  calling thread                                     threads of the pool
    requests -->  reset of every episode      ------------------->   environment.reset
                  turn to the engine          <-------------------   messages
                  the engine's tokens         ------------------->   environment.step(reply)
                  observation's tokens, next turn, or the end  <--   observation, done, rewards

Turns of different episodes interleave: each goes on as soon as its own environment has answered, while the engine draws
for the others. Seeds are those of (sample, turn), so that a repeated turn is the same.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from itertools import count

from owpo_megatron.config import EnvironmentConfig
from owpo_megatron.environments.episode import RunningEpisode
from owpo_megatron.environments.pool import Call, EnvironmentPool, Reply
from owpo_megatron.environments.turns import TurnTemplate
from owpo_megatron.errors import UserError
from owpo_megatron.types import Finished, Progress, Rollout, SampleRequest, Sampling
from owpo_megatron.types.seams import ConversingEngine


class EpisodeEngine:
    """Implements RolloutEngine: `generate` returns a whole episode for each request.

    Args:
        engine: draws the turns; not closed with this one.
        pool: runs the environments; the same.
        decode: token ids of a turn to the text that the environment gets.
    """

    def __init__(
        self,
        engine: ConversingEngine,
        pool: EnvironmentPool,
        turns: TurnTemplate,
        limits: EnvironmentConfig,
        decode: Callable[[Sequence[int]], str],
    ):
        self._engine, self._pool = engine, pool
        self._turns, self._limits, self._decode = turns, limits, decode
        self._numbers = count()
        self._tool_seconds = 0.0

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[Rollout]:
        """One episode per request, in submission order.

        Raises:
            EngineError: as the engine raises it. Environments that fail cost their own episode.
            UserError: a plan that begins or continues responses, which episodes do not know.
        """
        if any(request.prompt.prefix for request in requests):
            remedy = "this plan begins or continues responses, which episodes cannot; use another rollout.plan"
            raise UserError("environment.name", self._limits.name, remedy)
        if not requests:
            return []
        episodes = [
            RunningEpisode(
                next(self._numbers), request, request.sampling or sampling, self._limits, self._turns, self._decode
            )
            for request in requests
        ]
        turns = _Turns(episodes, self._pool, progress, finished)
        try:
            self._engine.converse(turns, sampling, turns.heard)
        finally:
            for episode in episodes:
                if episode.ended != "done":
                    self._pool.forget(episode.number, episode.prompt)
        self._tool_seconds += sum(episode.tool_seconds for episode in episodes)
        return [episode.rollout() for episode in episodes]

    def taken(self) -> dict[str, float]:
        """Metrics since the last call: seconds that episodes waited for their environments, all together."""
        seconds, self._tool_seconds = self._tool_seconds, 0.0
        return {"tool_seconds": seconds}

    def weight_versions(self) -> list[int]:
        return self._engine.weight_versions()

    def close(self) -> None:
        """Nothing of its own."""


class _Turns:
    """Implements Feed: the turns of these episodes. All but the pool's callbacks runs in the calling thread."""

    def __init__(
        self,
        episodes: Sequence[RunningEpisode],
        pool: EnvironmentPool,
        progress: Progress | None,
        finished: Finished | None,
    ):
        self.expected = len(episodes)
        self._episodes, self._pool = episodes, pool
        self._progress, self._finished = progress, finished
        self._answers: queue.SimpleQueue[tuple[int, Reply]] = queue.SimpleQueue()
        self._drawn: list[int] = []  # the episode of every request that was taken
        self._asked = 0  # episodes whose environment is at work
        self._over = 0

    def begin(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        for index in range(len(self._episodes)):
            self._ask(index)

    def take(self) -> list[SampleRequest]:
        requests = []
        while not self._answers.empty():
            index, reply = self._answers.get()
            if reply.fatal is not None:
                raise reply.fatal
            self._asked -= 1
            episode = self._episodes[index]
            episode.observe(reply)
            if episode.ended is None:
                self._drawn.append(index)
                requests.append(episode.next_turn())
            else:
                self._end(index)
        return requests

    def goes_on(self) -> bool:
        return self._asked > 0

    def heard(self, first: int, rollouts: Sequence[Rollout]) -> None:
        if self._progress is not None:  # a sign of life; long episodes end late
            self._progress(self._over, len(self._episodes))
        for index, rollout in zip(self._drawn[first : first + len(rollouts)], rollouts, strict=True):
            episode = self._episodes[index]
            episode.hear(rollout)
            if episode.ended is None:
                self._ask(index)
            else:
                self._end(index)

    def _ask(self, index: int) -> None:
        episode = self._episodes[index]
        self._asked += 1

        def then(reply: Reply) -> None:
            self._answers.put((index, reply))
            self._wake()

        self._pool.submit(Call(episode.number, episode.request.prompt, tuple(episode.replies)), then)

    def _end(self, index: int) -> None:
        self._over += 1
        if self._finished is not None:
            self._finished(index, [self._episodes[index].rollout()])
        if self._progress is not None:
            self._progress(self._over, len(self._episodes))
