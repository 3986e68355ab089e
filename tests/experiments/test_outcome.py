"""Scores of a finished run: which checkpoint is the best one, by which metric it was chosen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from owpo_megatron.experiments.outcome import _prepared_tokens, chosen_step, read_outcome
from owpo_megatron.methods import make_method


def finished_run(folder: Path, curve: Sequence[tuple[int, float, float]]) -> Path:
    """A run folder with evaluations of (step, Pass@1, Pass@4)."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"algorithm": {"name": "dapo"}}))
    lines = [json.dumps({"step": step, "eval": {"pass@1": one, "pass@4": four}}) for step, one, four in curve]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_best_score_is_that_of_a_trained_checkpoint(tmp_path: Path) -> None:
    """Untrained weights are no checkpoint: a curve from 0.5 down to 0.3 has the best 0.3."""
    outcome = read_outcome(finished_run(tmp_path / "run", [(0, 0.5, 0.6), (20, 0.3, 0.4)]), "pass@1")
    assert (outcome.best_step, outcome.best, outcome.first) == (20, 0.3, 0.5)


def test_another_metric_is_read_at_the_checkpoint_that_pass_at_1_chose(tmp_path: Path) -> None:
    """Pass@4 is highest at step 10, the best checkpoint is that of step 20 (paper, section 5.1)."""
    run = finished_run(tmp_path / "run", [(0, 0.1, 0.2), (10, 0.3, 0.9), (20, 0.4, 0.7), (30, 0.4, 0.8)])
    outcome = read_outcome(run, "pass@4")
    assert (outcome.best_step, outcome.best, outcome.final) == (20, 0.7, 0.8)


def test_the_first_score_that_is_good_enough(tmp_path: Path) -> None:
    outcome = read_outcome(
        finished_run(tmp_path / "run", [(0, 0.9, 1), (10, 0.2, 1), (20, 0.31, 1), (30, 0.4, 1)]), "pass@1"
    )
    assert outcome.reached(0.3) == 0.31 and outcome.reached(0.5) is None


@pytest.mark.parametrize(
    ("curve", "step"),
    [(((0, 0.9), (5, 0.1)), 5), (((0, 0.0), (5, 0.2), (10, 0.2)), 5), (((0, 0.4),), 0)],
)
def test_ties_go_to_the_earlier_evaluation(curve: tuple[tuple[int, float], ...], step: int) -> None:
    assert chosen_step(curve) == step


@pytest.mark.parametrize(
    ("method", "updates", "tokens"),
    [("dapo", 2, 0), ("gspo", 2, 0), ("real", 2, 50), ("real", 4, 75), ("real", 1, 100), ("entropy_mask", 2, 100)],
)
def test_the_pass_that_a_coupled_method_prepares_from(method: str, updates: int, tokens: int) -> None:
    """100 tokens: all, or all but the first minibatch's where the old policy's pass has them; with entropies all."""
    assert _prepared_tokens(make_method(method), updates, 100) == tokens
