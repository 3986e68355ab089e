"""Several servers used as one rollout engine, with recovery of those that die or hang."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine.answers import FOREIGN_VERSION, UNKNOWN_VERSION
from owpo_megatron.engine.client import EngineClient, EngineGone
from owpo_megatron.engine.generation import Generation, samples_per_post
from owpo_megatron.engine.members import Engine
from owpo_megatron.engine.sampler import Sampler
from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.types import ExpertShape, Feed, Finished, Progress, Rollout, SampleRequest, Sampling

T = TypeVar("T")


class Fleet:
    """RolloutEngine over `engines`, all of which must serve the same weights.

    Args:
        engines: running servers.
        config: concurrency, max_restarts (per engine, over the life of the fleet).
        on_restart: called without arguments, in the thread that called `generate` or `revive`, after a lost engine
            answers again with its initial weights; must push the current weights to it (pushing to all is fine).
        front: router that distributes samples among the engines; None: the fleet distributes them.
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
        self.through: Callable[[EngineClient], Sampler] = lambda client: client
        """Who sends an engine's requests for samples: its client, or rollout workers (owpo_megatron/workers)."""
        self.take_cache: Callable[[], None] = lambda: None
        """Called before samples are drawn (engine.in_turn)."""
        self.notify: Callable[[str], None] = lambda text: None
        """Called with a line for each engine that is lost and restarted."""
        self.weights_change = False
        """Whether weights may be pushed while samples are drawn; each sample then has the versions that drew it."""
        self.lock = threading.RLock()
        """Held while engines are made ready to generate, or brought back; also by a push from another thread."""
        self._closed = False
        self._config = config
        self._restarts = [0] * len(engines)
        self._version: int | None = None

    @property
    def clients(self) -> list[EngineClient]:
        return [engine.client for engine in self.engines]

    @property
    def restarts(self) -> int:
        """Restarts of all engines so far."""
        return sum(self._restarts)

    def check_tokens(self, vocab_size: int) -> None:
        """Take engines whose samples have a token of this id, or a larger one, for broken from now on."""
        for client in (*self.clients, *([] if self.front is None else [self.front])):
            client.vocab_size = vocab_size

    def ask_for_experts(self, shape: ExpertShape) -> None:
        """Let samples be asked for with the experts that they were routed to, from now on.

        Raises:
            UserError: a server does not return them.
        """
        for client in self.clients:
            if not client.returns_experts:
                remedy = (
                    f"the server at {client.url} does not return experts; start it with "
                    "--enable-return-routed-experts, or set false"
                )
                raise UserError("rollout.routing_replay", True, remedy)
            client.experts = shape

    def own_weights(self) -> None:
        """Accept only weights that this fleet pushes from now on: another program may use the same servers."""
        owner = secrets.token_hex(4)
        for client in (*self.clients, *([] if self.front is None else [self.front])):
            client.owner = owner

    def describe(self) -> dict[str, str]:
        """Return the servers' name and version, as the run's summary has them."""
        return {"name": "sglang", "version": self.clients[0].server_version()}

    def weight_versions(self) -> list[int]:
        """Return the weight version that each engine reports."""
        versions = [client.weight_version() for client in self.clients]
        self._version = max(versions)
        return versions

    def revive(self, error: EngineError | None = None) -> int:
        """Restart engines that do not answer and push their weights; return how many there were.

        The engine that `error` names is restarted in any case: it may answer once more while it exits.
        """
        with self.lock:
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
        """Draw one response per request, in submission order.

        Raises:
            EngineError: an engine refused a request, stayed dead after `max_restarts` restarts, or serves other weights
                than the rest even after `on_restart`.
        """
        return self._generate(requests, sampling, progress, finished) if requests else []

    def draw_until(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        enough: Callable[[], bool],
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[Rollout]:
        """The same, until `enough` is true; it is asked whenever a response has been drawn. The others are cut: their
        finish reason is "abort", and they have the tokens that were drawn so far, which may be none."""
        return self._generate(requests, sampling, progress, finished, enough=enough) if requests else []

    def converse(self, feed: Feed, sampling: Sampling, finished: Finished) -> None:
        """Draw what the feed asks for, which may come out of what was drawn before, until it ends.

        Raises:
            EngineError: as `generate`.
        """
        self._generate([], sampling, None, finished, feed)

    def _generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        progress: Progress | None,
        finished: Finished | None,
        feed: Feed | None = None,
        enough: Callable[[], bool] | None = None,
    ) -> list[Rollout]:
        with self.lock:
            self.revive()
            self.with_revival(self._make_agree)
            self.take_cache()
        clients = self.clients if self.front is None else [self.front]
        count = len(requests) if feed is None else feed.expected
        # sglang-router does not accept a list of sampling parameters, and siblings differ in their seeds; a response
        # that counts for `enough` must not wait for others
        alone = self.front is not None or enough is not None
        return Generation(
            [self.through(client) for client in clients],
            requests,
            sampling,
            samples_per_post=1 if alone else samples_per_post(count, len(clients), sampling),
            concurrency=self._config.concurrency * len(self.engines) // len(clients),
            give_up=self._give_up,
            bring_back=self._bring_back_while_generating,
            version=None if self.weights_change else self._version,
            progress=progress,
            finished=finished,
            feed=feed,
            enough=enough,
        ).run()

    def with_revival(self, call: Callable[[], T]) -> T:
        """Call until no engine is lost during the call, reviving lost ones in between, up to `max_restarts`."""
        while True:
            try:
                return call()
            except EngineGone as error:
                if not self.revive(error):
                    raise

    def abort(self) -> None:
        """Make the run's own engines write their stacks, and end them; for a run that hangs."""
        for engine in self.engines:
            with contextlib.suppress(Exception):  # the run ends in any case
                engine.abort()

    def close(self) -> None:
        self._closed = True
        for engine in self.engines:
            engine.close()
        if self.front is not None:
            self.front.close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make_agree(self) -> None:
        """Ensure that all engines serve complete weights of one version."""
        versions = self.weight_versions()
        if FOREIGN_VERSION in versions:
            self.notify("another program has loaded weights into this run's engines; they get the run's again")
        if not _agree(versions) and self.on_restart is not None:
            self.on_restart()  # one of them missed an update, or an update was interrupted
            versions = self.weight_versions()
        if not _agree(versions):
            raise EngineError(f"engines serve different weight versions {versions}; push the weights to all of them")

    def _lost(self, error: EngineError | None = None) -> dict[int, EngineGone]:
        """Return the engines that do not answer, with the error, and the one that `error` came from."""
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
        known = self.clients[index].incarnation
        with self.lock:
            if self.clients[index].incarnation != known:
                return  # a push, by another thread, found it lost and brought it back
            lost = {index: error} if self.front is None else self._lost()
            if not lost:
                raise error  # every engine answers, so the router does not
            self._bring_back(lost, needed=self._version)

    def _bring_back(self, lost: Mapping[int, EngineGone], needed: int | None) -> None:
        """Restart engines and push the weights, which must then have version `needed`, if that is known."""
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
                lost = self._lost(error)  # another engine was lost during the restart
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
        if self._closed:  # samples that nobody waits for any more
            raise EngineError(f"engine {index} is closed") from error
        if self._restarts[index] >= self._config.max_restarts:
            raise EngineError(
                f"engine {index} was lost again after {self._restarts[index]} restarts (engine.max_restarts): {error}"
            ) from error
        self._restarts[index] += 1
        count, most = self._restarts[index], self._config.max_restarts
        self.notify(f"engine {index} is lost, restart {count} of at most {most}: {str(error).splitlines()[0]}")
        self.engines[index].restart()


def _agree(versions: Sequence[int]) -> bool:
    """Whether all are the same version of complete weights."""
    return len(set(versions)) == 1 and not {UNKNOWN_VERSION, FOREIGN_VERSION} & set(versions)
