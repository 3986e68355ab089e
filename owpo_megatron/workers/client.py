"""An engine's client whose requests rollout workers send."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from owpo_megatron.engine.client import EngineClient
from owpo_megatron.types import Rollout, SampleRequest, Sampling

if TYPE_CHECKING:
    from owpo_megatron.workers.pool import WorkerPool


class WorkersClient:
    """Implements Sampler: stands in for an engine's client where responses are drawn (engine/generation.py).

    What ends or cuts requests goes to the engine directly: it knows samples by their names, whoever sent them.
    """

    def __init__(self, client: EngineClient, pool: WorkerPool):
        self._client, self._pool = client, pool

    @property
    def url(self) -> str:
        return self._client.url

    @property
    def incarnation(self) -> int:
        return self._client.incarnation

    def cut(self, name: str) -> None:
        self._client.cut(name)

    def submit(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        version: int | None = None,
        names: Sequence[str] | None = None,
    ) -> Future[list[Rollout]]:
        """Have a post sent, as EngineClient.submit does; the rollouts may have verdicts."""
        return self._pool.submit(self._client, requests, sampling, version, names)
