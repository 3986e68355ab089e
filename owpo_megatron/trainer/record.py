"""Write a run's files while it trains: metrics lines, evaluations, checkpoints, the best weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from owpo_megatron.run.best import BestWeights
from owpo_megatron.run.layout import step_name
from owpo_megatron.run.metrics import MetricsFile, StepLine, silent_step
from owpo_megatron.run.state import RunState
from owpo_megatron.trainer.evaluate import Evaluator
from owpo_megatron.trainer.main_rank import MainRank
from owpo_megatron.trainer.profile import StepProfiler
from owpo_megatron.trainer.stop import StopSignal
from owpo_megatron.trainer.watchdog import WRITING, Watchdog
from owpo_megatron.types import Sink, StepLog


class RunRecord:
    """Implements the loop's Record.

    Args:
        metrics, evaluator: of global rank 0; None elsewhere. `evaluator` is None where nothing is evaluated, too.
        sinks: receive checkpoints, on global rank 0.
        watchdog: notes this rank's progress, phase by phase.
        in_background: write checkpoints while the next steps train (checkpoint.asynchronous).
        profiler: profiles this rank's steps; None: none.
        files_written: returns when what the step writes besides, its rollouts, is on disk.
    """

    def __init__(
        self,
        main: MainRank,
        state: RunState,
        best: BestWeights,
        metrics: MetricsFile | None,
        evaluator: Evaluator | None,
        stop: StopSignal,
        sinks: Sequence[Sink],
        watchdog: Watchdog,
        in_background: bool = False,
        profiler: StepProfiler | None = None,
        files_written: Callable[[], None] = lambda: None,
    ):
        self._main = main
        self._state = state
        self._best = best
        self._metrics = metrics
        self._evaluator = evaluator
        self._stop = stop
        self._sinks = sinks
        self._watchdog = watchdog
        self._in_background = in_background
        self._profiler = profiler
        self._files_written = files_written
        self._log: StepLine | None = None

    def restore(self) -> int:
        return self._state.restore()

    def save(self, step: int) -> None:
        if self._log is not None:  # the checkpoint holds the line, for a run that is killed before it is written
            self._log.add(weights=self._state.digest())
        self._files_written()
        self.settle()  # at most one is being written
        self._state.begin_save(step, self._in_background)
        if not self._in_background:
            self.settle()

    def settle(self, wait: bool = True) -> None:
        with self._watchdog.phase(WRITING) if wait and self._in_background else nullcontext():
            saved = self._state.settle(wait, self._watchdog.beat)
        if saved is not None:
            for sink in self._sinks if self._metrics else ():
                sink.checkpoint(*saved)

    def evaluate(self, step: int) -> None:
        """Evaluate the weights that the engines have, once per step: after a resume, an evaluation that is in
        metrics.jsonl is not made again."""

        def work() -> dict[str, Any]:
            assert self._metrics and self._evaluator
            scores = self._metrics.evaluation(step)
            if scores is None:
                scores = self._evaluator.run(step_name(step))
                self._metrics.append({"step": step, "eval": scores})
            return scores

        self._best.consider(step, self._main.run(work))

    @contextmanager
    def step(self, step: int) -> Iterator[StepLog]:
        self._watchdog.begin(step + 1)
        with self._profiler.around(step + 1) if self._profiler else nullcontext():
            with self._metrics.step(step) if self._metrics else silent_step(step) as log:
                log.on_phase, self._log = self._watchdog.phase, log
                if self._state.is_saving:
                    with log.timed("checkpoint"):
                        self.settle(wait=False)
                yield log
                self._log = None
                self._files_written()
                if "weights" not in log:
                    log.add(weights=self._state.digest())

    def stop_requested(self) -> bool:
        return self._stop.requested()
