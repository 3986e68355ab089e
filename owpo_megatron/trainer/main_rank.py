"""Work that only global rank 0 does (engines, verifiers, disk) while the other ranks stand by for it.

    rank 0                      other ranks
    run(work): work()           run(work): wait for a message
      engine died, restarted      "weights" -> take part in pushing the weights again, wait on
      -> push_again()             "done"    -> return the same result as rank 0
    send "done", return
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from owpo_megatron.types import WeightSync

T = TypeVar("T")


class MainRank:
    """Runs work on rank 0 and gives its result to all ranks; lets rank 0 ask for the weights in the middle.

    Args:
        broadcast: gives rank 0's object to all ranks (collective).
        push: pushes the current weights to the engines (collective).
    """

    def __init__(self, is_main: bool, broadcast: Callable[[Any], Any], push: Callable[[], None]):
        self.is_main = is_main
        self._broadcast = broadcast
        self._push = push

    def run(self, work: Callable[[], T]) -> T:
        """`work()` of rank 0, on every rank. An exception there ends rank 0, and with it the job."""
        if self.is_main:
            result = work()
            self._broadcast(("done", result))
            return result
        while True:
            message, result = self._broadcast(None)
            if message == "done":
                return result
            self._push()

    def push_again(self) -> None:
        """On rank 0, inside `run`: an engine lost its weights; every rank takes part in pushing them."""
        assert self.is_main
        self._broadcast(("weights", None))
        self._push()


class RankedSync:
    """The WeightSync of all ranks around that of rank 0: the others only walk through their share of the weights."""

    def __init__(self, on_main: WeightSync | None):
        self._on_main = on_main
        self.version = -1

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        if self._on_main is None:
            for _ in weights:
                pass
        else:
            self._on_main.push(weights, version)
        self.version = version

    def close(self) -> None:
        if self._on_main is not None:
            self._on_main.close()
