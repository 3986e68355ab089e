"""Engines that generate under a virtual clock: the product's posts, dealt as its lanes take them.

An engine decodes its whole batch one token at a time; between two samples' ends the batch is the same, so that time
advances from end to end.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from owpo_megatron.config import Config
from owpo_megatron.engine.generation import Post, Posts, first_shares, samples_per_post
from owpo_megatron.families import HFModel, forward_flops
from owpo_megatron.plan.engine import engine_memory
from owpo_megatron.plan.machine import HOST, LAUNCHES, REDUCTION, Machine
from owpo_megatron.types import Sampling


@dataclass(frozen=True)
class DecodingCost:
    """Seconds of an engine's work.

    Args:
        weights: bytes on a GPU, read at every step.
        token: bytes of one cached token on a GPU.
        flops: of one token's matrix products, on a GPU.
        attention: FLOPs per token of context, on a GPU.
        bandwidth, peak: of a GPU, what is reached of them.
        tokens: that the cache holds.
        latency: seconds of a step besides: launches, reductions among the GPUs, scheduling.
    """

    weights: float
    token: float
    flops: float
    attention: float
    bandwidth: float
    peak: float
    tokens: int
    latency: float = 0.0

    @classmethod
    def of(cls, config: Config, model: HFModel, machine: Machine) -> DecodingCost:
        memory = engine_memory(config, model, machine.memory)
        matmul, attention = forward_flops(model)
        tp = config.engine.tp
        return cls(
            memory.weights,
            memory.token,
            matmul / tp,
            2 * attention / tp,  # forward_flops has the mean over a sequence's places, half of its length
            machine.rates.memory * machine.decoding,
            machine.peak * machine.decoding,
            memory.tokens,
            HOST + model.num_layers * (LAUNCHES + (2 * REDUCTION if tp > 1 else 0.0)),
        )

    def step(self, batch: int, context: float) -> float:
        """Seconds of one token of each of `batch` sequences, which have `context` tokens together.

        Memory and arithmetic overlap: the slower of reading weights and cache, and computing. With few sequences the
        latency is most of it, which is what the longest response alone costs.
        """
        reading = (self.weights + context * self.token) / self.bandwidth
        return self.latency + max(reading, (batch * self.flops + context * self.attention) / self.peak)

    def prefill(self, tokens: int) -> float:
        return tokens * (self.flops + tokens * self.attention / 2) / self.peak


class VirtualEngine:
    """One engine's batch. Samples wait for a place in the cache in the order in which they came."""

    def __init__(self, cost: DecodingCost, batch: int):
        self._cost, self._most = cost, batch
        self._decoded = 0  # tokens per sequence since the start
        self._context = 0.0
        self._running: list[tuple[int, int, int]] = []  # (decoded at its end, sample, prompt and response tokens)
        self._waiting: list[tuple[int, int, int]] = []  # (sample, prompt, response)
        self.now = 0.0
        self.busy = 0.0

    def admit(self, sample: int, prompt: int, response: int) -> None:
        self._waiting.append((sample, prompt, response))
        self._fill()

    def next_end(self) -> float | None:
        """Return the time at which the next sample ends; None: nothing runs."""
        return self.now + self._until_end() if self._running else None

    def finish_next(self) -> int:
        """Advance to the next sample's end; returns the sample."""
        seconds = self._until_end()
        self.now, self.busy = self.now + seconds, self.busy + seconds
        end, sample, tokens = heapq.heappop(self._running)
        self._context += (end - self._decoded) * (len(self._running) + 1) - tokens
        self._decoded = end
        self._fill()
        return sample

    def _until_end(self) -> float:
        steps, batch = self._running[0][0] - self._decoded, len(self._running)
        return steps * self._cost.step(batch, self._context + batch * steps / 2)

    def _fill(self) -> None:
        while self._waiting and len(self._running) < self._most:
            sample, prompt, response = self._waiting.pop(0)
            seconds = self._cost.prefill(prompt)
            self.now, self.busy = self.now + seconds, self.busy + seconds
            heapq.heappush(self._running, (self._decoded + response, sample, prompt + response))
            self._context += prompt


@dataclass(frozen=True)
class Generated:
    """Result of generating a step's samples."""

    seconds: float  # until the last sample ends
    busy: float  # mean over the engines: seconds with work
    ends: tuple[float, ...]  # of every sample


def generate(lengths: Sequence[tuple[int, int]], engines: int, cost: DecodingCost, concurrency: int) -> Generated:
    """Generate samples of (prompt, response) tokens as `Generation` deals them.

    Args:
        concurrency: `engine.concurrency`, samples in flight per engine.
    """
    longest = max(response for _, response in lengths)
    size = samples_per_post(len(lengths), engines, Sampling(max_tokens=longest))
    mean = sum(prompt + response for prompt, response in lengths) / len(lengths)
    batch = max(1, min(concurrency, int(cost.tokens / mean)))
    all_engines = [VirtualEngine(cost, batch) for _ in range(engines)]
    posts, left, ends = Posts(), {}, [0.0] * len(lengths)
    posts.add([Post(first, min(first + size, len(lengths))) for first in range(0, len(lengths), size)])
    post_of: dict[int, Post] = {}

    def take(engine: int) -> None:
        post = posts.take(engine)
        if post is None:
            return
        left[post] = post.end - post.first
        for sample in range(post.first, post.end):
            post_of[sample] = post
            all_engines[engine].admit(sample, *lengths[sample])

    for engine, share in enumerate(first_shares(len(posts), engines, max(1, concurrency // size))):
        for _ in range(share):
            take(engine)
    due = [(end, engine) for engine, one in enumerate(all_engines) if (end := one.next_end()) is not None]
    heapq.heapify(due)
    while due:
        _, engine = heapq.heappop(due)
        sample = all_engines[engine].finish_next()
        ends[sample] = all_engines[engine].now
        left[post_of[sample]] -= 1
        if not left[post_of[sample]]:
            take(engine)
        if (end := all_engines[engine].next_end()) is not None:
            heapq.heappush(due, (end, engine))
    return Generated(max(ends), sum(one.busy for one in all_engines) / engines, tuple(ends))


def generate_on(
    lengths: Sequence[Sequence[tuple[int, int]]], engines: int, cost: DecodingCost, concurrency: int
) -> Generated:
    """Generate a step of a stream: engines go on with the next steps' samples while the longest ones end, which no step
    waits for (`rollout.surplus`).

    Args:
        lengths: of several steps; the first is what the stream has begun with.
    """
    first = generate(lengths[0], engines, cost, concurrency)
    whole = generate([one for step in lengths for one in step], engines, cost, concurrency)
    more = len(lengths) - 1
    seconds, busy = (whole.seconds - first.seconds) / more, (whole.busy - first.busy) / more
    return Generated(max(seconds, busy), busy, whole.ends)
