"""The best weights: of the run, by the scores of its evaluations, and of the stage under way.

runs/NAME/
    weights/step_000040/    the policy after 40 steps: state/ and hf/, a converted folder as `model.path` takes it
        score.json          its step and score
        manifest.json       sha256 of every file; written last, so its presence marks a complete folder
    best -> weights/step_000040
    reached -> weights/step_000020      the first weights with a wanted score (checkpoint.keep_at_score)

A folder stays as long as the run's best, the stage's, `reached` or a checkpoint on disk refers to it: a resumed run
finds the candidates that it had, whatever happened after the checkpoint. A link changes in one rename, so best/ is
always there and always whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from owpo_megatron.errors import UserError
from owpo_megatron.run.checkpoints import CheckpointFolder
from owpo_megatron.run.layout import SCORE as SCORE_FILE
from owpo_megatron.run.layout import STATE, RunFolder, step_name, whole_steps
from owpo_megatron.run.sealed import seal, verify_manifest
from owpo_megatron.types import Candidate, Ranks, Storable, Swappable

SCORE = "pass@1"  # of an evaluation: what the paper chooses its checkpoints by (section 5.1)


def is_better(score: float, than: Candidate | None) -> bool:
    """Ties go to the earlier evaluation: as good with fewer steps."""
    return than is None or score > than.score


class BestWeights:
    """Chooses the best weights and keeps them on disk; those of the stage in host memory too, for the swap.

    Args:
        run_dir: folder of the run.
        ranks, policy: writing is collective.
        carry: writes hf/ (config, tokenizer) into a folder; called on rank 0.
        checkpoints: whose folders refer to weights too.
        of_run: keep the best of the run (checkpoint.keep_best).
        stage: the reference where its swaps take the best of a stage, else None.
        at_score: keep the first weights with at least this score (checkpoint.keep_at_score); None: do not.
    """

    def __init__(
        self,
        run_dir: Path,
        ranks: Ranks,
        policy: Storable,
        carry: Callable[[Path], None],
        checkpoints: CheckpointFolder,
        of_run: bool,
        stage: Swappable | None,
        at_score: float | None = None,
    ):
        self._folder = RunFolder(run_dir)
        self._root = self._folder.weights
        self._at_score = at_score
        self._ranks = ranks
        self._policy = policy
        self._carry = carry
        self._checkpoints = checkpoints
        self._of_run = of_run
        self._stage = stage
        self.run: Candidate | None = None
        self.reached: Candidate | None = None

    def path(self, step: int) -> Path:
        return self._root / step_name(step)

    def consider(self, step: int, scores: Mapping[str, Any]) -> None:
        """The policy after `step` steps has these scores. Collective.

        Untrained weights (step 0) are no candidate: a stage's best was trained in that stage.

        Raises:
            UserError: the evaluation has no Pass@1.
        """
        if step == 0 or not (self._of_run or self._stage or self._at_score is not None):
            return
        if SCORE not in scores:
            raise UserError("eval.pass_at", sorted(scores), f"the best weights are chosen by {SCORE}; add 1 to pass_at")
        candidate = Candidate(step, scores[SCORE])
        best_of_run = self._of_run and is_better(candidate.score, self.run)
        best_of_stage = self._stage is not None and is_better(candidate.score, self._stage.candidate)
        if best_of_stage:
            assert self._stage is not None
            self._stage.keep(candidate)
        if best_of_run:
            self.run = candidate
        first_at_score = self.reached is None and self._at_score is not None and candidate.score >= self._at_score
        if first_at_score:
            self.reached = candidate
        if best_of_run or best_of_stage or first_at_score:
            self._write(candidate)

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save: which weights are best; the weights themselves are on disk already."""
        reached = {} if self._at_score is None else {"reached": _plain(self.reached)}
        return {"run": _plain(self.run), "stage": _plain(self._stage.candidate if self._stage else None)} | reached

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take up the candidates of a checkpoint (None: of no checkpoint), and drop what came after it. Collective.

        Raises:
            UserError: their weights are damaged or gone.
        """
        state = state or {"run": None, "stage": None}
        self.run = self._found(state["run"]) if self._of_run else None
        self.reached = self._found(state.get("reached")) if self._at_score is not None else None
        stage = self._found(state["stage"]) if self._stage else None
        if stage is not None:
            assert self._stage is not None
            self._stage.restore_candidate(stage, self.path(stage.step) / STATE)
        self.tidy()

    def tidy(self) -> None:
        """Point the links to their weights and remove what nothing refers to. On rank 0; others do nothing."""
        if not self._ranks.is_main or not self._root.is_dir():
            return
        self._point(self._folder.best, self.run)
        self._point(self._folder.reached, self.reached)
        states = [self.state_dict(), *(state.get("best") or {} for state in self._checkpoints.trainer_states())]
        wanted = {known["step"] for state in states for known in state.values() if known}
        for step in whole_steps(self._root):
            if step not in wanted:
                shutil.rmtree(self.path(step))
        for half_written in self._root.glob(".writing_*"):
            shutil.rmtree(half_written)

    def _point(self, link: Path, candidate: Candidate | None) -> None:
        if candidate is None:
            link.unlink(missing_ok=True)
            return
        fresh = link.with_name(f".{link.name}")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(self.path(candidate.step).relative_to(link.parent), target_is_directory=True)
        os.replace(fresh, link)

    def _write(self, candidate: Candidate) -> None:
        scratch = self._root / f".writing_{candidate.step:06d}"
        if self._ranks.is_main:
            shutil.rmtree(scratch, ignore_errors=True)
            (scratch / STATE).mkdir(parents=True)
        self._ranks.barrier()
        self._policy.save_weights(scratch / STATE)
        if self._ranks.is_main:
            self._carry(scratch)
            facts = {"step": candidate.step, SCORE: candidate.score}
            (scratch / SCORE_FILE).write_text(json.dumps(facts) + "\n")
            seal(scratch, self.path(candidate.step))
            self.tidy()
        self._ranks.barrier()

    def _found(self, known: Mapping[str, Any] | None) -> Candidate | None:
        if known is None:
            return None
        candidate = Candidate(known["step"], known["score"])
        folder = self.path(candidate.step)
        if self._ranks.is_main and (candidate.step not in whole_steps(self._root) or not verify_manifest(folder)):
            remedy = "the checkpoint needs these weights, and they are damaged or gone; start over with --fresh"
            raise UserError("weights", folder, remedy)
        return candidate


def _plain(candidate: Candidate | None) -> dict[str, Any] | None:
    return None if candidate is None else {"step": candidate.step, "score": candidate.score}
