"""Grading in worker processes that can be killed: a rule may hang, crash or exhaust memory, the pool does not.

                 submit()                      guard: forks the worker, relays, ends it
    items ---->  strings decide? -- no -->     worker: rule(item), one at a time
                 |      bounded queue          waits for a reply or the deadline
    verdicts <-  in submission order  <-- reason

A worker that misses the deadline is killed with all processes that its rule started, one that dies is noticed at once
by the end of its socket; its guard, which has imported the rules, forks another, and the item gets its reason code
(`timeout`, `crashed`). The guards are plain subprocesses with a socket, not `multiprocessing`: it works under torchrun
and in scripts without a main guard, and no fork copies a process that runs gloo or CUDA threads.
"""

from __future__ import annotations

import pickle
import time
import weakref
from collections.abc import Mapping, Sequence

from owpo_megatron.types import GradingItem, Verdict
from owpo_megatron.verifiers.dispatcher import Dispatcher
from owpo_megatron.verifiers.grading import Grading
from owpo_megatron.verifiers.process import Job
from owpo_megatron.verifiers.rules import Rule, quick_part


class VerifierPool:
    """A `Verifier` that survives its rules. Safe to use from any thread.

    Args:
        rules: rule of each domain; importable functions or picklable objects, they travel by name.
        workers: processes, started here and replaced when they die.
        timeout: seconds from the start of grading an item until its worker is killed (at most twice that on a machine
            that is too busy to let it run).
        memory_bytes: address space of a worker; a rule that wants more is `crashed`.
        max_pending: items that wait or are being graded, beyond which `submit` blocks.
        keeps_children: processes that a rule leaves behind are its business; they end with the worker. False: the
            worker is replaced before the next item.

    Raises:
        RuntimeError: (submit, score) the pool is closed, or its workers do not start at all.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        workers: int = 2,
        timeout: float = 4.0,
        memory_bytes: int = 2 * 2**30,
        max_pending: int = 4096,
        keeps_children: bool = False,
    ):
        self._quick = {domain: quick_part(rule) for domain, rule in rules.items()}
        hello = pickle.dumps((dict(rules), memory_bytes), protocol=5)
        dispatcher = Dispatcher(hello, workers, timeout, max_pending, keeps_children)
        self._dispatcher = dispatcher
        self._finalizer = weakref.finalize(self, dispatcher.close)

    def submit(self, items: Sequence[GradingItem]) -> Grading:
        """Start grading these items while the caller continues, e.g. generates the next ones.

        String comparison happens here; the rest waits for a worker. Blocks while more than `max_pending` items are
        under way.
        """
        unknown = {item.domain for item in items} - self._quick.keys()
        assert not unknown, f"no rule for {unknown}"
        if not self._finalizer.alive:
            raise RuntimeError("this verifier pool is closed")
        grading = Grading(len(items))
        try:
            for index, item in enumerate(items):
                start = time.perf_counter()
                quick = self._quick[item.domain]
                found = quick(item) if quick is not None else None
                if found is None:
                    self._dispatcher.enqueue(Job(grading, index, item))
                else:
                    grading.put(index, Verdict.of(found, time.perf_counter() - start))
        except BaseException:  # interrupted: the rest is not needed
            grading.cancel()
            raise
        return grading

    def score(self, items: Sequence[GradingItem]) -> list[Verdict]:
        grading = self.submit(items)
        try:
            return grading.result()
        except BaseException:
            grading.cancel()
            raise

    def close(self) -> None:
        """Stop the workers; takes at most a second each."""
        self._finalizer()
