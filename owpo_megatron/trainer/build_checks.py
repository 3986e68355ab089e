"""Make a run's checks out of its configuration, and keep the rollouts that they may ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from owpo_megatron.config import Config
from owpo_megatron.engine import Fleet, rollouts_path, save_rollouts
from owpo_megatron.run.layout import RunFolder
from owpo_megatron.samples import SampleRecorder
from owpo_megatron.trainer.checks import StepChecks, mismatch_bound
from owpo_megatron.types import Group
from owpo_megatron.verifiers import refuse_failed_grading
from owpo_megatron.workers import WorkerPool


def build_checks(
    config: Config,
    fleet: Fleet | None,
    workers: WorkerPool | None,
    draws_as_policy: bool,
    report: Callable[[str], None],
) -> StepChecks:
    """The checks of a run's steps.

    Args:
        fleet: engines that sample with the policy's weights; None: rollouts are replayed, or another rank's.
        draws_as_policy: the plan draws at the run's own temperature, so that log-probs can be compared.
    """
    compares = fleet is not None and draws_as_policy
    bound = mismatch_bound(config.checks, config.sync, config.model.dtype) if compares else None
    refuse = partial(refuse_failed_grading, rule=config.verifier.rule)
    counts: dict[str, Callable[[], int]] = {}
    if fleet:
        counts["engine_restarts"] = lambda: fleet.restarts
    if workers:
        counts["workers_lost"] = lambda: workers.lost
    return StepChecks(config.checks, bound, refuse, counts, report)


class KeptRollouts:
    """Saves the rollouts of each step, while the step goes on, or of a step that is asked for. On global rank 0.

    Args:
        recorder: writes their verdicts; None: nothing is saved unless it is asked for.
        replays: they are on disk already.
    """

    def __init__(self, folder: RunFolder, recorder: SampleRecorder | None, replays: bool):
        self._folder, self._recorder, self._replays = folder, recorder, replays
        self._drawn: tuple[int, Sequence[Group]] | None = None
        self._writer = ThreadPoolExecutor(1, "rollouts")
        self._writing: Future[None] | None = None

    def record(self, step: int, groups: Sequence[Group], kept: Sequence[Group]) -> None:
        """All groups of a step, and those of them that are trained on."""
        self.wait()
        self._drawn = (step, groups)
        if self._recorder is not None:
            if not self._replays:
                self._writing = self._writer.submit(self._save, step, groups)
            self._recorder.graded(step, groups, kept)

    def wait(self) -> None:
        """Return when the step's rollouts are on disk, before the step is reported as done.

        Raises:
            OSError: they could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def save(self) -> None:
        """Save the rollouts of the step under way, on the rank that has them."""
        self.wait()
        if self._drawn is not None:
            self._save(*self._drawn)

    def _save(self, step: int, groups: Sequence[Group]) -> None:
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        save_rollouts(rollouts_path(self._folder.rollouts, step + 1), rollouts)
