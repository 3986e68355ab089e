"""Result of a finished run: its curve on held-out problems, the area under it, and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owpo_megatron.methods import Method, make_method
from owpo_megatron.run.best import SCORE
from owpo_megatron.run.metrics_reader import RunMetrics, read_run

TRAINING_COLUMNS = ("reward_mean", "entropy", "grad_norm", "response_length", "w_mean", "kl_ref")


@dataclass(frozen=True)
class Outcome:
    """Metrics of a finished run.

    Example:
        Outcome(curve=((0, 0.16), (15, 0.6), (30, 0.97)), chosen_by=(...), auc=0.5825, token_passes=812_345, ...)
    """

    curve: tuple[tuple[int, float], ...]  # (step, score on held-out problems)
    chosen_by: tuple[tuple[int, float], ...]  # (step, Pass@1), by which checkpoints are chosen
    auc: float  # mean height of the curve: trapezoidal rule over the evaluations
    token_passes: int  # forward passes of response tokens, see `token_passes`
    seconds: float  # duration of the training steps
    training: dict[str, list[float]]  # columns of metrics.jsonl, one value per step

    @property
    def first(self) -> float:
        return self.curve[0][1]

    @property
    def final(self) -> float:
        return self.curve[-1][1]

    @property
    def best_step(self) -> int:
        return chosen_step(self.chosen_by)

    @property
    def best(self) -> float:
        """Score of the best checkpoint, which was chosen by Pass@1: not the highest of another metric."""
        return dict(self.curve)[self.best_step]

    def reached(self, score: float) -> float | None:
        """Score of the first trained checkpoint with at least this Pass@1 (checkpoint.keep_at_score); None: never."""
        pass_at_1 = dict(self.chosen_by)
        return next((value for step, value in self.curve if step > 0 and pass_at_1[step] >= score), None)


def read_outcome(folder: Path, metric: str) -> Outcome:
    """Read the outcome of a finished run; `metric` names the evaluation's score."""
    run = read_run(folder)
    curve = tuple((step, float(score)) for step, score in run.eval_column(metric))
    training = {name: [float(value) for value in run.column(name).values] for name in TRAINING_COLUMNS}
    seconds = sum(run.column("seconds.total").values)
    chosen_by = tuple((step, float(score)) for step, score in run.eval_column(SCORE)) or curve
    measured = {name: values for name, values in training.items() if values}
    return Outcome(curve, chosen_by, area(curve), token_passes(run), seconds, measured)


def chosen_step(curve: Sequence[tuple[int, float]]) -> int:
    """Return the step whose weights are the run's best (run/best.py): trained, the highest score, ties to the earlier.

    Example:
        >>> chosen_step(((0, 0.5), (20, 0.3), (40, 0.4), (60, 0.4)))
        40
    """
    trained = [(step, score) for step, score in curve if step > 0] or list(curve)
    return max(trained, key=lambda point: (point[1], -point[0]))[0]


def area(curve: tuple[tuple[int, float], ...]) -> float:
    """Return the mean height of a piecewise linear curve.

    Example:
        >>> area(((0, 0.0), (10, 1.0), (30, 1.0)))  # (10 * 0.5 + 20 * 1) / 30
        0.8333333333333334
    """
    pairs = list(zip(curve, curve[1:], strict=False))
    whole = sum((later - step) * (score + next_score) / 2 for (step, score), (later, next_score) in pairs)
    return whole / (curve[-1][0] - curve[0][0])


def token_passes(run: RunMetrics) -> int:
    """Count a run's compute in forward passes of response tokens; prompts are not counted.

    A generated token counts 1, a token of an update 3 (forward and backward), the old policy's pass 1 if a step has
    several updates, the reference's pass 1, and 1 the pass of the current policy that methods with coupling `group` or
    `minibatch` prepare from.
    """
    name: str = run.setting("algorithm.name")
    method = make_method(name)
    total = 0
    for line in run.steps:
        tokens = int(line.get("tokens", 0))
        total += int(line["tokens_generated"]) + 3 * tokens
        total += tokens if method.needs_old and int(line.get("updates", 0)) > 1 else 0
        total += _reference_tokens(method.needs_reference, line, tokens)
        total += _prepared_tokens(method, int(line.get("updates", 0)), tokens)
    return total


def _prepared_tokens(method: Method, updates: int, tokens: int) -> int:
    """Tokens of the current policy's pass; a step's first minibatch has it from the old policy's."""
    if method.coupling not in ("group", "minibatch"):
        return 0
    is_spared = method.needs_old and updates > 1 and not method.needs_entropy
    return tokens - tokens // updates if is_spared else tokens


def _reference_tokens(needs: str, line: dict[str, Any], tokens: int) -> int:
    if needs == "none":
        return 0
    return int(line.get("active_tokens", tokens)) if needs == "active" else tokens
