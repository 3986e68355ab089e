"""Interface of an engine for a generation: a client of a server, or whoever draws for it in another process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from owpo_megatron.types import Rollout, SampleRequest, Sampling


class Sampler(Protocol):
    """An engine, or a router in front of several. Every method may be called from any thread."""

    @property
    def url(self) -> str:
        """Address of the engine, as its errors name it."""

    @property
    def incarnation(self) -> int:
        """Incremented when it has been restarted: what was submitted before may have been lost with it."""

    def submit(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        version: int | None = None,
        names: Sequence[str] | None = None,
    ) -> Future[list[Rollout]]:
        """Ask for one response per request, in order, and return at once.

        The future's callbacks run in a thread of the sampler's; they do not wait, and they submit further requests. It
        ends in any case: after an answer, a time-out, the engine's end, or that of the sampler.

        Args:
            version: that of the weights that must draw them; None: any.
            names: one for each sample, for `cut`; None: none is cut.

        Errors of the future:
            EngineGone: the engine is lost, or answers wrongly; all that was submitted to it ends so. It is restarted.
            EngineError: it refused. This ends the generation, as any other error does.
        """

    def cut(self, name: str) -> None:
        """End the sample of this name, which is answered with the tokens that it has. May wait for the engine.

        Without effect where no such sample is drawn.

        Raises:
            EngineGone: the engine is lost.
        """
