"""A step's groups, drawn when they are asked for, or some steps ahead of it while the policy trains. On global rank 0.

    main thread                                thread of the supply
        take(n): let steps up to n + bound begin  --->  draw n + 1, n + 2, ... one after the other
        wait for step n                           <---  groups of step n, and the state after them
        train on it, push weights n + 1                 go on: engines keep what they have begun

Step n + bound is begun when the engines have the weights of step n, or later ones. So no token is sampled by weights
that are more than `bound` steps older than those that are trained on it.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from owpo_megatron.errors import EngineError, RunError
from owpo_megatron.types import Rollout, WeightSync

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class WeightsNeeded(EngineError):
    """An engine was restarted while its samples were drawn ahead; only all ranks together can push its weights."""


class ExclusiveSync:
    """A WeightSync that pushes while no engine is being made ready to generate (Fleet.lock)."""

    def __init__(self, sync: WeightSync, lock: AbstractContextManager[Any]):
        self._sync, self._lock = sync, lock

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        with self._lock:
            self._sync.push(weights, version)

    def close(self) -> None:
        self._sync.close()


def pushed_by_this_thread(push: Callable[[], None]) -> Callable[[], None]:
    """`push`, which is collective; in any other thread WeightsNeeded is raised instead."""
    owner = threading.get_ident()

    def guarded() -> None:
        if threading.get_ident() != owner:
            raise WeightsNeeded("an engine was restarted and needs weights")
        push()

    return guarded


def staleness(step: int, rollouts: Sequence[Rollout], bound: int) -> dict[str, float]:
    """Mean and maximum, over the tokens, of the steps by which the weights that sampled them are behind.

    Args:
        step: steps done, which is the version of the weights that are trained.

    Raises:
        RunError: a token is older than the bound.

    Example:
        >>> from owpo_megatron.types import Prompt
        >>> prompt = Prompt("a", (1,), "", "")
        >>> old = Rollout(prompt, (5, 6, 7), (-0.1, -0.2, -0.3), 4, "stop", 0, versions=((3, 2), (4, 1)))
        >>> staleness(5, [old, Rollout(prompt, (5,), (-0.1,), 5, "stop", 1)], bound=2)
        {'mean': 1.25, 'max': 2}
    """
    ages = [(step - version, count) for rollout in rollouts for version, count in rollout.spans]
    oldest = max(age for age, _ in ages)
    if oldest > bound:
        raise RunError(f"step {step + 1} got tokens of weights {oldest} steps old (rollout.max_staleness)")
    mean = sum(age * count for age, count in ages) / max(sum(count for _, count in ages), 1)
    return {"mean": mean, "max": oldest}


@dataclass(frozen=True)
class Ahead(Generic[T]):
    """A step that is being drawn: its result, and the state of the drawing parts after it."""

    step: int
    result: Future[tuple[T, dict[str, Any]]]


class Supply(Generic[T]):
    """Draws steps in order, at most `bound` of them ahead.

    Args:
        draw: draws a step, in the thread of the supply.
        state: state of the parts that `draw` changes (stream, ledger, ...), as it goes into checkpoints.
        restore: takes such a state up.
        recover: brings the engines back and pushes the weights of the last push; called in the thread of `take`.
        bound: `rollout.max_staleness`.
        steps: length of the run; none is drawn beyond.
    """

    def __init__(
        self,
        draw: Callable[[int], T],
        state: Callable[[], dict[str, Any]],
        restore: Callable[[dict[str, Any]], None],
        recover: Callable[[], None],
        bound: int,
        steps: int,
    ):
        self._draw, self._state, self._restore, self._recover = draw, state, restore, recover
        self._bound, self._steps = bound, steps
        self._ahead: deque[Ahead[T]] = deque()
        self._todo: deque[Ahead[T]] = deque()
        self._failed = False  # at a step that is not taken yet; nothing is drawn after it
        self._change = threading.Condition()  # guards todo and failed
        self._thread: threading.Thread | None = None
        self._taken: dict[str, Any] | None = None

    def take(self, step: int) -> T:
        """The step's result, once it is drawn. Steps are taken in order.

        Raises:
            Exception: what `draw` raised. A lost engine (WeightsNeeded) is brought back instead, and what was drawn
                ahead is drawn again with the same seeds.
        """
        while True:
            self._begin(step)
            assert self._ahead[0].step == step, "steps are taken in order"
            try:
                result, state = self._ahead[0].result.result()
            except WeightsNeeded:
                self._start_over()
                self._recover()
                continue
            self._ahead.popleft()
            self._taken = state
            return result

    def state_dict(self) -> dict[str, Any]:
        """The state after the last step that was taken: what was drawn beyond it is drawn again after a resume."""
        return self._state() if self._taken is None else self._taken

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not self._ahead, "a state is restored before anything is drawn"
        self._restore(state)
        self._taken = copy.deepcopy(state)

    def _begin(self, step: int) -> None:
        """Let all steps up to the bound be drawn."""
        if self._taken is None:
            self._taken = copy.deepcopy(self._state())
        first = self._ahead[-1].step + 1 if self._ahead else step
        with self._change:
            if not self._failed:
                new = [Ahead[T](one, Future()) for one in range(first, min(step + self._bound + 1, self._steps))]
                self._ahead.extend(new)
                self._todo.extend(new)
                self._change.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="supply", daemon=True)
            self._thread.start()

    def _start_over(self) -> None:
        """Forget what was drawn ahead. The thread has had nothing to do since a step failed."""
        self._ahead.clear()
        assert self._taken is not None
        self._restore(copy.deepcopy(self._taken))
        self._failed = False

    def _work(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._todo)
                one = self._todo.popleft()
            try:
                found = self._draw(one.step)
                one.result.set_result((found, copy.deepcopy(self._state())))
            except BaseException as error:
                with self._change:  # later steps would start from a state in the middle of this one
                    self._failed = True
                    self._todo.clear()
                one.result.set_exception(error)
