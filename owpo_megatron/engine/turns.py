"""Engines on the trainer's GPUs, which have the memory in turn.

    engines generate   -> free(weights)      paused, no version; weights and cache released
    the policy trains
    weights are pushed -> take_weights()     memory for weights, then the push; the cache stays released
    engines generate   -> take_cache()
    an evaluation ends -> free()             paused; the cache alone released

An engine that was restarted meanwhile has all its memory and releases what is asked for next. Not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from owpo_megatron.engine.answers import UNKNOWN_VERSION
from owpo_megatron.engine.client import EngineClient
from owpo_megatron.engine.fleet import Fleet
from owpo_megatron.errors import UserError

WEIGHTS, CACHE = "weights", "kv_cache"  # SGLang's tags


class EngineTurns:
    """The memory of a fleet's engines. Every call revives engines that are gone, which get the weights.

    Raises:
        UserError: an engine was started without SGLang's enable_memory_saver: it would release nothing.
    """

    def __init__(self, fleet: Fleet):
        self._fleet = fleet
        for client in fleet.clients:
            if not client.saves_memory:
                remedy = (
                    f"engine {client.url} was started without enable_memory_saver; start it with that, or set false"
                )
                raise UserError("engine.in_turn", True, remedy)

    def free(self, weights: bool = False) -> None:
        """Release the caches, and the weights where the policy trains next."""
        self._fleet.with_revival(lambda: self._each(lambda client: _free(client, weights)))

    def take_weights(self) -> None:
        """Give engines the memory for weights that are pushed next. An engine that is gone is the push's to find."""
        self._each(lambda client: client.resume_memory(WEIGHTS))

    def take_cache(self) -> None:
        """Give engines their caches, and let them generate."""
        self._fleet.with_revival(lambda: self._each(_take))

    def _each(self, call: Callable[[EngineClient], None]) -> None:
        """Call for all engines at a time; raise the first error once all have answered."""
        with ThreadPoolExecutor(len(self._fleet.clients)) as pool:
            list(pool.map(call, self._fleet.clients))


def _free(client: EngineClient, weights: bool) -> None:
    client.pause()
    client.flush()  # refuses where something still runs, where a release would end the server
    if weights:
        client.set_version(UNKNOWN_VERSION)
    client.release_memory(CACHE, *([WEIGHTS] if weights else []))


def _take(client: EngineClient) -> None:
    client.resume_memory(CACHE)
    client.resume()
