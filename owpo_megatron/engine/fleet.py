"""The rollout engine: one or several servers behind one face, with recovery of those that die or hang."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine.client import UNKNOWN_VERSION, EngineClient, EngineGone
from owpo_megatron.engine.generation import Generation, samples_a_post
from owpo_megatron.errors import EngineError
from owpo_megatron.types import Finished, Progress, Rollout, SampleRequest, Sampling

T = TypeVar("T")


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
            time.sleep(0.5)  # first of all: one that is about to end may still answer
            try:
                self.client.model_info(timeout=5.0)
                break
            except EngineGone:
                if time.monotonic() > deadline:
                    raise
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

    def revive(self, error: EngineError | None = None) -> int:
        """Restart engines that do not answer, and the one that is gone according to `error`, which may answer once
        more while it ends; have their weights pushed; return how many there were."""
        lost = self._lost(error)
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
        self.with_revival(self._make_agree)
        clients = self.clients if self.front is None else [self.front]
        return Generation(
            clients,
            requests,
            sampling,
            # sglang-router takes no list of sampling parameters, and siblings differ by their seeds
            samples_a_post=samples_a_post(len(requests), len(clients), sampling) if self.front is None else 1,
            concurrency=self._config.concurrency,
            give_up=self._give_up,
            bring_back=self._bring_back_while_generating,
            progress=progress,
            finished=finished,
        ).run()

    def with_revival(self, call: Callable[[], T]) -> T:
        """`call()`, once more after each engine that was lost meanwhile was brought back; `max_restarts` ends it."""
        while True:
            try:
                return call()
            except EngineGone as error:
                if not self.revive(error):
                    raise

    def close(self) -> None:
        for engine in self.engines:
            engine.close()
        if self.front is not None:
            self.front.close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make_agree(self) -> None:
        """Have every engine serve whole weights, and all the same."""
        if not _agree(self.weight_versions()) and self.on_restart is not None:
            self.on_restart()  # an update has missed one of them, or was left half-way
        versions = self.weight_versions()
        if not _agree(versions):
            raise EngineError(f"engines serve different weight versions {versions}; push the weights to all of them")

    def _lost(self, error: EngineError | None = None) -> dict[int, EngineGone]:
        """The engines that do not answer, and the one that `error` came from, with what became of the question."""
        lost = {}
        for index, client in enumerate(self.clients):
            if isinstance(error, EngineGone) and error.url == client.url:
                lost[index] = error
                continue
            try:
                client.model_info(timeout=30.0)
            except EngineGone as no_answer:
                lost[index] = no_answer
        return lost

    def _give_up(self, index: int) -> None:
        if self.front is None:
            self.engines[index].stop()

    def _bring_back_while_generating(self, index: int, error: EngineGone) -> None:
        lost = {index: error} if self.front is None else self._lost()
        if not lost:
            raise error  # every engine answers: it is the router that does not
        self._bring_back(lost, needed=self._version)

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
                self._expect(needed, restarted)
                break
            except EngineGone as error:
                lost = self._lost(error)  # another one went while these came back
                if not lost:
                    raise

    def _expect(self, version: int | None, restarted: set[int]) -> None:
        for index in sorted(restarted):
            found = self.clients[index].weight_version()
            if version is not None and found != version:
                raise EngineError(
                    f"engine {index} was restarted and has weights of version {found}, but {version} is current; "
                    "on_restart must push them"
                )

    def _restart(self, index: int, error: EngineGone) -> None:
        if self._restarts[index] >= self._config.max_restarts:
            raise EngineError(
                f"engine {index} was lost again after {self._restarts[index]} restarts (engine.max_restarts): {error}"
            ) from error
        self._restarts[index] += 1
        self.engines[index].restart()


def _agree(versions: Sequence[int]) -> bool:
    """All are whole weights, and the same."""
    return len(set(versions)) == 1 and UNKNOWN_VERSION not in versions
