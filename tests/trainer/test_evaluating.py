"""Pass@k, the evaluator, and when things are due."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
from fakes import FakeEngine, FakeVerifier
from tiny import make_config

from owpo_megatron.config import EvalConfig
from owpo_megatron.trainer.evaluate import Evaluator, pass_at_k
from owpo_megatron.trainer.stage import StagePlan, due_every
from owpo_megatron.types import Prompt, Rollout, Verdict

PROBLEMS = [Prompt(f"q/{index}", (index,), "", "") for index in range(6)]


@pytest.mark.parametrize("samples", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples: int) -> None:
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        subsets = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
        expected = sum(map(any, subsets)) / len(subsets)
        assert math.isclose(pass_at_k(samples, correct, k), expected, abs_tol=1e-12)


def evaluator(engine: FakeEngine, out: Path, **fields: object) -> Evaluator:
    config = EvalConfig.model_validate({"samples": 4, "pass_at": [1, 2], "limit": 3} | fields)
    verifier = FakeVerifier({"1": "ok"})

    def grade(rollouts: list[Rollout]) -> list[Verdict]:
        from owpo_megatron.types import GradingItem

        return verifier.score([GradingItem(str(rollout.response_ids[0]), "") for rollout in rollouts])

    return Evaluator(config, PROBLEMS, 8, (2,), engine, grade, 1, out)  # type: ignore[arg-type]


def test_scores_of_a_hand_example(tmp_path: Path) -> None:
    """4, 2 and 0 of 4 samples are right: Pass@1 = (1 + 1/2 + 0) / 3, Pass@2 = (1 + 5/6 + 0) / 3."""
    right = {"q/0": 4, "q/1": 2, "q/2": 0}
    seen: dict[str, int] = {}

    def respond(prompt: Prompt, rng: object) -> list[int]:
        seen[prompt.id] = seen.get(prompt.id, 0) + 1
        return [1, 2] if seen[prompt.id] <= right[prompt.id] else [0, 5, 2]

    scores = evaluator(FakeEngine(respond), tmp_path / "eval").run("step_000007")
    assert scores["pass@1"] == pytest.approx(1.5 / 3) and scores["pass@2"] == pytest.approx((1 + 5 / 6) / 3)
    assert (scores["problems"], scores["samples"], scores["response_length"]) == (3, 4, 2.5)
    kept = [json.loads(text) for text in (tmp_path / "eval" / "step_000007.jsonl").read_text().splitlines()]
    assert [line["verdicts"] for line in kept] == [["ok"] * 4, ["ok", "ok", "wrong", "wrong"], ["wrong"] * 4]
    assert kept[1]["responses"] == [[1, 2], [1, 2], [0, 5, 2], [0, 5, 2]] and kept[1]["id"] == "q/1"


def test_two_evaluations_ask_for_the_same_and_training_for_other_seeds(tmp_path: Path) -> None:
    from owpo_megatron.trainer.rollouts import sample_seed

    engine = FakeEngine(lambda prompt, rng: [1, 2])
    one = evaluator(engine, tmp_path)
    one.run("a")
    one.run("b")
    first, second = engine.calls
    assert first == second and len({request.seed for request in first}) == 12
    training = {sample_seed(1, draw, sibling) for draw in range(3) for sibling in range(4)}
    assert not training & {request.seed for request in first}


def test_a_stage_lies_between_swaps() -> None:
    """50 steps with a swap every 20."""
    plan = StagePlan(50, 20)
    assert [plan.stage(step) for step in (0, 19, 20, 39, 40, 49)] == [0, 0, 1, 1, 2, 2]
    assert [plan.step_in_stage(step) for step in (0, 19, 20, 49)] == [0, 19, 0, 9]
    assert [plan.stage_steps(step) for step in (0, 20, 40)] == [20, 20, 10]
    assert [done for done in range(1, 51) if plan.swap_due(done)] == [20, 40]


def test_a_fixed_reference_has_one_stage() -> None:
    plan = StagePlan.of(make_config(Path("m"), reference={"refresh": "fixed", "every": 2}))
    assert [plan.stage(5), plan.step_in_stage(5), plan.stage_steps(5)] == [0, 5, 6]
    assert not any(plan.swap_due(done) for done in range(1, 7))


@pytest.mark.parametrize(
    ("interval", "at_end", "due"),
    [(2, False, [2, 4]), (2, True, [2, 4, 5]), (0, True, [5]), (0, False, []), (5, True, [5])],
)
def test_due_every_so_many_steps(interval: int, at_end: bool, due: list[int]) -> None:
    assert [done for done in range(6) if due_every(interval, done, at_end, steps=5)] == due
