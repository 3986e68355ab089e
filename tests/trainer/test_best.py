"""Choice of the best weights, by hand, and their files on disk, whatever happens in between.

The sharded state is a dummy file, the reference records its calls. With the real ones: tests/policy, tests/e2e.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from owpo_megatron.errors import UserError
from owpo_megatron.run.best import BestWeights
from owpo_megatron.run.checkpoints import CheckpointFolder
from owpo_megatron.run.sealed import verify_manifest
from owpo_megatron.types import Candidate


class OneRank:
    is_main = True

    def barrier(self) -> None:
        pass


class Stage:
    """Fake reference that records the weights to keep, and where they were restored from."""

    def __init__(self) -> None:
        self.candidate: Candidate | None = None
        self.kept: list[int] = []
        self.restored: list[str] = []

    def keep(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.kept.append(candidate.step)

    def restore_candidate(self, candidate: Candidate, state: Path) -> None:
        self.candidate = candidate
        self.restored.append((state / "shard").read_text())


class Run:
    """A run folder in which the weights of step N are a file with that number."""

    def __init__(self, folder: Path, of_run: bool = True, of_stage: bool = True, at_score: float | None = None):
        self.folder, self.at_score = folder, at_score
        self.now = 0
        self.stage = Stage()
        self.checkpoints = CheckpointFolder(folder / "checkpoints", keep=2)
        stage = self.stage if of_stage else None
        self.best = BestWeights(folder, OneRank(), self, self._carry, self.checkpoints, of_run, stage, at_score)

    def evaluate(self, *scores: float, start: int = 1) -> None:
        """One evaluation a step."""
        for self.now, score in enumerate(scores, start):
            self.best.consider(self.now, {"pass@1": score, "problems": 4})

    def checkpoint(self, step: int) -> None:
        self.checkpoints.start(step)
        self.checkpoints.finish(step, {"step": step, "best": self.best.state_dict()})
        self.best.tidy()

    def resumed(self) -> Run:
        """The run as another process finds it."""
        again = Run(self.folder, at_score=self.at_score)
        found = again.checkpoints.newest()
        again.best.load_state_dict(found[1]["best"] if found else None)
        return again

    def weights(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "weights").iterdir())

    def linked(self) -> str:
        return (self.folder / "best" / "state" / "shard").read_text()

    def save_weights(self, state: Path) -> None:
        (state / "shard").write_text(f"after {self.now}")

    def _carry(self, folder: Path) -> None:
        (folder / "hf").mkdir()


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.5, 0.4, 0.3], 1),  # at the stage's start
        ([0.3, 0.4, 0.5], 3),  # at its end
        ([0.3, 0.5, 0.4], 2),
        ([0.4, 0.4, 0.4], 1),  # ties go to the earlier
        ([0.3, 0.5, 0.5], 2),
        ([0.5, 0.3, 0.5], 1),
        ([0.0, 0.0, 0.0], 1),  # never right: there is a best nevertheless
    ],
)
def test_the_best_by_hand(scores: Sequence[float], best: int, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.evaluate(*scores)
    assert run.stage.candidate == run.best.run == Candidate(best, scores[best - 1])
    assert run.weights() == [f"step_{best:06d}"] and run.linked() == f"after {best}"
    assert json.loads((tmp_path / "best" / "score.json").read_text()) == {"step": best, "pass@1": scores[best - 1]}
    assert verify_manifest(tmp_path / "best") and (tmp_path / "best" / "hf").is_dir()


def test_a_stage_begins_without_a_candidate_and_the_run_remembers(tmp_path: Path) -> None:
    """A swap between the evaluations 2 and 3: the stage's best is then of the new stage, though the run's is older."""
    run = Run(tmp_path)
    run.evaluate(0.5, 0.4)
    run.stage.candidate = None  # as a swap leaves it
    run.evaluate(0.2, 0.3, start=3)
    assert run.stage.candidate == Candidate(4, 0.3) and run.best.run == Candidate(1, 0.5)
    assert run.stage.kept == [1, 3, 4]
    assert run.weights() == ["step_000001", "step_000004"] and run.linked() == "after 1"


def test_the_first_weights_with_a_score_are_kept(tmp_path: Path) -> None:
    """The paper's suboptimal reference: 0.30 is first reached at step 2; later, better ones do not replace it."""
    run = Run(tmp_path, of_stage=False, at_score=0.3)
    run.evaluate(0.1)
    assert not (tmp_path / "reached").exists()
    run.evaluate(0.31, 0.2, 0.5, start=2)
    assert (tmp_path / "reached" / "state" / "shard").read_text() == "after 2" and run.linked() == "after 4"
    assert run.weights() == ["step_000002", "step_000004"]
    run.checkpoint(4)
    run.evaluate(0.6, start=5)
    again = run.resumed()
    assert again.best.reached == Candidate(2, 0.31) and again.best.run == Candidate(4, 0.5)
    assert (tmp_path / "reached").resolve().name == "step_000002"


def test_untrained_weights_are_no_candidate(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.best.consider(0, {"pass@1": 1.0})
    assert run.best.run is None and not (tmp_path / "weights").exists()


@pytest.mark.parametrize(("of_run", "of_stage"), [(True, False), (False, True), (False, False)])
def test_only_what_is_asked_for_is_kept(of_run: bool, of_stage: bool, tmp_path: Path) -> None:
    run = Run(tmp_path, of_run, of_stage)
    run.evaluate(0.5)
    assert (run.best.run is not None) == of_run and (tmp_path / "best").exists() == of_run
    assert (run.stage.candidate is not None) == of_stage
    assert (tmp_path / "weights").exists() == (of_run or of_stage)


def test_an_evaluation_without_pass_at_1_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="eval.pass_at = .*chosen by pass@1; add 1 to pass_at"):
        Run(tmp_path).best.consider(1, {"pass@8": 0.5})


# ---------------------------------------------------------------------------------------------- killed and resumed
def test_a_resumed_run_has_the_candidates_of_its_checkpoint(tmp_path: Path) -> None:
    """After the checkpoint of step 2 came a better evaluation; the weights of step 1 are there nevertheless."""
    run = Run(tmp_path)
    run.evaluate(0.4, 0.3)
    run.checkpoint(2)
    run.evaluate(0.9, start=3)
    assert run.weights() == ["step_000001", "step_000003"] and run.linked() == "after 3"
    again = run.resumed()
    assert again.best.run == again.stage.candidate == Candidate(1, 0.4)
    assert again.stage.restored == ["after 1"]
    assert again.weights() == ["step_000001"] and again.linked() == "after 1"


def test_weights_stay_as_long_as_a_checkpoint_refers_to_them(tmp_path: Path) -> None:
    """Two checkpoints are kept: the older best goes when the second checkpoint after it is written."""
    run = Run(tmp_path)
    run.evaluate(0.1)
    run.checkpoint(1)
    run.evaluate(0.2, start=2)
    run.checkpoint(2)
    assert run.weights() == ["step_000001", "step_000002"]
    run.checkpoint(3)
    assert run.weights() == ["step_000002"]


def test_killed_before_the_first_checkpoint_everything_starts_over(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.evaluate(0.4)
    again = run.resumed()
    assert again.best.run is None and again.weights() == [] and not (tmp_path / "best").is_symlink()


def test_half_written_weights_are_ignored_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the weights and their manifest: best/ is the one before, whole."""
    run = Run(tmp_path)
    run.evaluate(0.4)
    run.checkpoint(1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("owpo_megatron.run.best.seal", killed)
    with pytest.raises(KeyboardInterrupt):
        run.evaluate(0.5, start=2)
    assert run.linked() == "after 1" and verify_manifest(tmp_path / "best")
    assert run.weights() == [".writing_000002", "step_000001"]
    assert run.resumed().weights() == ["step_000001"]


def test_a_damaged_checkpoint_does_not_stand_in_the_way(tmp_path: Path) -> None:
    """The run goes on from the one before, and with its candidates."""
    run = Run(tmp_path)
    run.evaluate(0.4)
    run.checkpoint(1)
    run.evaluate(0.5, start=2)
    run.checkpoint(2)
    (tmp_path / "checkpoints" / "step_000002" / "trainer.json").write_text('{"st')
    again = run.resumed()
    assert again.best.run == Candidate(1, 0.4) and again.linked() == "after 1"


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_weights_that_a_checkpoint_needs_and_are_damaged_are_told(damage: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.evaluate(0.4)
    run.checkpoint(1)
    shard = tmp_path / "weights" / "step_000001" / "state" / "shard"
    shard.write_text("others") if damage == "changed" else shard.unlink()
    with pytest.raises(UserError, match="weights = .*step_000001.*damaged or gone"):
        run.resumed()
