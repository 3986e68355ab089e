"""State of a run in a checkpoint, and resuming from it bit for bit."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from owpo_megatron.errors import UserError
from owpo_megatron.run.best import BestWeights
from owpo_megatron.run.checkpoints import CheckpointFolder
from owpo_megatron.run.metrics import MetricsFile
from owpo_megatron.types import Ranks, Reference, Stateful, Storable, Writing

LOOK_SECONDS = 0.2  # between two looks at a checkpoint that is waited for


class RunState:
    """The state of a run: weights and optimizer, reference, best weights, place in the prompt stream, the open line.

    Args:
        rollouts: whose stream is rank 0's.
        batches: with what the method keeps from step to step, the same on every rank.
        metrics: None on the other ranks.
        carry: writes hf/ (config, tokenizer) into a folder; called on rank 0.
        say: prints a line for the person watching the run.
        steps: length of the run; None: any.
    """

    def __init__(
        self,
        ranks: Ranks,
        policy: Storable,
        reference: Reference,
        rollouts: Stateful,
        batches: Stateful,
        best: BestWeights,
        metrics: MetricsFile | None,
        checkpoints: CheckpointFolder,
        carry: Callable[[Path], None],
        say: Callable[[str], None],
        steps: int | None = None,
    ):
        self._ranks = ranks
        self._policy = policy
        self._reference = reference
        self._rollouts = rollouts
        self._batches = batches
        self._best = best
        self._metrics = metrics
        self._checkpoints = checkpoints
        self._carry = carry
        self._say = say
        self._steps = steps
        self._run = secrets.token_hex(6)  # in every checkpoint of this run
        self._under_way: tuple[int, Writing | None] | None = None

    def begin_save(self, step: int, in_background: bool) -> None:
        """Begin a checkpoint, which `settle` makes whole. Collective.

        Args:
            in_background: the sharded state is written while training goes on; otherwise it is when this returns.
        """
        assert self._under_way is None, "one checkpoint at a time"
        if self._ranks.is_main:
            folder = self._checkpoints.start(step).parent
            with self._checkpoints.disk_errors(step):
                self._carry(folder)
        self._ranks.barrier()
        path, writing = self._checkpoints.state_path(step), None
        with self._checkpoints.disk_errors(step):
            if in_background:
                writing = self._policy.begin_save(path)
            else:
                self._policy.save(path)
        self._under_way = step, writing
        state = {"step": step, "reference": self._reference.state_dict(), "best": self._best.state_dict()}
        if self._metrics:
            state |= {"rollouts": self._rollouts.state_dict(), "batches": self._batches.state_dict()}
            state |= {"line": self._metrics.under_way(), "run": self._run}
            self._checkpoints.describe(step, state)

    @property
    def is_saving(self) -> bool:
        return self._under_way is not None

    def settle(self, wait: bool = True, beat: Callable[[], None] = lambda: None) -> tuple[int, Path] | None:
        """The step and folder of the checkpoint that was begun, once it is whole; it counts from the rename into place.
        None where there is none, or where it is still written. Collective.

        Args:
            wait: until it is whole.
            beat: called while it waits, as often as the disk gets on.

        Raises:
            RunError: it could not be written; older ones are as they were.
        """
        if self._under_way is None:
            return None
        step, writing = self._under_way
        known: dict[str, str] = {}
        if writing is not None:
            if wait:
                _wait_for(writing, beat)
            elif self._ranks.any(not writing.ready()):
                return None
            with self._checkpoints.disk_errors(step):
                known = writing.finish()
        if self._metrics:
            self._checkpoints.complete(step, known)
            self._best.tidy()
        self._under_way = None
        self._ranks.barrier()
        return step, self._checkpoints.path(step)

    def close(self) -> None:
        """Drop a checkpoint that is not whole yet: the run failed."""
        if self._under_way is not None and self._under_way[1] is not None:
            self._under_way[1].abandon()

    def digest(self) -> str:
        """Identity of the policy's weights in this layout. Collective."""
        return self._policy.weights_digest()

    def restore(self, checkpoint: Path | None = None, to_evaluate: bool = False) -> int:
        """Take over the newest whole checkpoint, or the given one; returns its step, 0 where there is none. Collective.

        Args:
            to_evaluate: only the policy is wanted, and nothing on disk changes.

        Raises:
            UserError: it is beyond the length of the run, or of another model, reference or data; or there are
                checkpoints of another run among those of this one.
        """
        found: tuple[Path, dict[str, Any]] | None = None
        if self._ranks.is_main:
            if not to_evaluate:
                self._checkpoints.tidy()
            found = self._checkpoints.read(checkpoint) if checkpoint else self._checkpoints.newest()
            if checkpoint is None:
                self._refuse_others()
            self._run = (found[1].get("run") if found else None) or self._run
        found = self._ranks.broadcast(found)
        state: dict[str, Any] = found[1] if found else {"step": 0}
        if self._steps is not None and state["step"] > self._steps and not to_evaluate:
            done = f"{state['step']} steps already ({self._checkpoints.path(state['step'])})"
            remedy = (
                f"this run has done {done}; ask for at least as many, or give that checkpoint "
                "to another run as model.path"
            )
            raise UserError("optimizer.steps", self._steps, remedy)
        if not to_evaluate:
            self._best.load_state_dict(state.get("best"))  # before the policy, whose parameters it lands in
        if found is not None:
            state_path = found[0]
            self._policy.restore(state_path, state["reference"]["is_policy"])
            if not to_evaluate:
                self._reference.load_state_dict(state["reference"])
                self._batches.load_state_dict(state.get("batches", {"memory": {}}))
            if self._ranks.is_main:
                self._rollouts.load_state_dict(state["rollouts"])
            told = "" if to_evaluate else f", reference {self._reference.version.ref_id}"
            for step, fault in sorted(self._checkpoints.damaged.items()):
                self._say(f"the checkpoint of step {step} is damaged ({fault}); an older one is taken")
            self._say(f"resumed at step {state['step']} from {state_path.parent}{told}")
        if self._metrics and not to_evaluate:
            if lost := self._metrics.drop_after(state["step"], state.get("line")):
                steps = f"step {lost[0]}" if len(lost) == 1 else f"{len(lost)} steps from {lost[0]} to {lost[-1]}"
                self._say(f"metrics.jsonl has lost the lines of {steps}; the weights do not depend on them")
            if self._checkpoints.damaged:
                self._metrics.note(damaged_checkpoints=sorted(self._checkpoints.damaged))
        return state["step"]

    def _refuse_others(self) -> None:
        """The newest one may be a copy out of another run's folder, whose weights would be taken for this run's."""
        steps: dict[str, list[str]] = {}
        for state in self._checkpoints.trainer_states():
            if isinstance(state, dict) and isinstance(state.get("run"), str):
                steps.setdefault(state["run"], []).append(str(state.get("step")))
        if len(steps) > 1:
            of_each = "; ".join(f"one has step {', '.join(some)}" for some in steps.values())
            remedy = f"are of {len(steps)} runs: {of_each}; move those of other runs out of this folder"
            raise UserError("checkpoints", self._checkpoints.path(0).parent, remedy)


def _wait_for(writing: Writing, beat: Callable[[], None]) -> None:
    progress = -1
    while not writing.ready(LOOK_SECONDS):
        if writing.progress() != progress:
            progress = writing.progress()
            beat()
