"""An engine whose turns are scripted, and environments for it: deterministic parts on both sides of an episode."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable, Sequence

from owpo_megatron.types import Feed, Finished, Rollout, SampleRequest, Sampling


class ScriptedEngine:
    """A ConversingEngine: `respond` has the request and a generator of its seed. Log-probs name (seed, place).

    It serves the last request first, one at a time, so that turns of different samples come in an odd order.
    """

    def __init__(self, respond: Callable[[SampleRequest, random.Random], Sequence[int]], eos: int, version: int = 3):
        self._respond, self._eos, self._version = respond, eos, version
        self.requests: list[SampleRequest] = []

    def converse(self, feed: Feed, sampling: Sampling, finished: Finished) -> None:
        wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        feed.begin(lambda: wakes.put(None))
        waiting: list[tuple[int, SampleRequest]] = []
        while waiting or feed.goes_on():
            if not waiting:
                wakes.get(timeout=300)
            for request in feed.take():
                waiting.append((len(self.requests), request))
                self.requests.append(request)
            if waiting:
                number, request = waiting.pop()
                finished(number, [self._draw(request, request.sampling or sampling)])

    def weight_versions(self) -> list[int]:
        return [self._version]

    def _draw(self, request: SampleRequest, sampling: Sampling) -> Rollout:
        ids = tuple(self._respond(request, random.Random(request.seed)))[: sampling.max_tokens]
        logps = tuple(-(request.seed % 97) - place / 128 for place in range(len(ids)))
        reason = "stop" if ids[-1] == self._eos else "length"
        return Rollout(request.prompt, ids, logps, self._version, reason, request.seed)
