"""Evaluation inside a run, and when things are due. Estimators and results are in tests/evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import FakeEngine
from tiny import make_config

from owpo_megatron.config import ReferenceConfig, VerifierConfig
from owpo_megatron.evaluation.draw import Answering
from owpo_megatron.evaluation.prepare import PreparedSet, held_out
from owpo_megatron.evaluation.sets import sets_of_run
from owpo_megatron.trainer.evaluate import Evaluator
from owpo_megatron.trainer.schedule import StagePlan, due_every
from owpo_megatron.types import Prompt
from owpo_megatron.verifiers import make_verifier

PROBLEMS = [Prompt(f"q/{index}", (index,), "", "1") for index in range(6)]


GRADED = VerifierConfig(rule="gsm8k", workers=1)


def held_out_set(**fields: object) -> PreparedSet:
    config = make_config(Path("m"), eval={"samples": 4, "pass_at": [1, 2], "limit": 3} | fields)
    return held_out(sets_of_run(config.eval, config.verifier.rule)[0], PROBLEMS, "data")


def evaluator(engine: FakeEngine, out: Path, *sets: PreparedSet) -> Evaluator:
    verifier = make_verifier(GRADED, {"default"}, {domain: "gsm8k" for one in sets for domain in one.rules})
    decode = {1: "#### 1", 0: "#### 2"}.__getitem__
    answering = Answering(engine, verifier, lambda ids: decode(ids[0]), (2,), 8, seed=1)
    return Evaluator(sets or [held_out_set()], answering, out)


def test_scores_of_a_hand_example(tmp_path: Path) -> None:
    """4, 2 and 0 of 4 samples are right: Pass@1 = (1 + 1/2 + 0) / 3, Pass@2 = (1 + 5/6 + 0) / 3."""
    right = {"q/0": 4, "q/1": 2, "q/2": 0}
    seen: dict[str, int] = {}

    def respond(prompt: Prompt, rng: object) -> list[int]:
        seen[prompt.id] = seen.get(prompt.id, 0) + 1
        return [1, 2] if seen[prompt.id] <= right[prompt.id] else [0, 5, 2]

    scores = evaluator(FakeEngine(respond), tmp_path / "eval").run("step_000007")
    assert scores.keys() == {"pass@1", "pass@2", "problems", "samples", "response_length"}
    assert scores["pass@1"] == pytest.approx(1.5 / 3) and scores["pass@2"] == pytest.approx((1 + 5 / 6) / 3)
    assert (scores["problems"], scores["samples"], scores["response_length"]) == (3, 4, 2.5)
    kept = [json.loads(text) for text in (tmp_path / "eval" / "step_000007.jsonl").read_text().splitlines()]
    assert [line["verdicts"] for line in kept] == [["ok"] * 4, ["ok", "ok", "wrong", "wrong"], ["wrong"] * 4]
    assert kept[1]["responses"] == [[1, 2], [1, 2], [0, 5, 2], [0, 5, 2]] and kept[1]["id"] == "q/1"
    assert json.loads((tmp_path / "eval" / "step_000007.json").read_text())["metrics"]["pass@1"]["low"] == 0.0


def test_several_sets_of_which_the_first_decides(tmp_path: Path) -> None:
    """ "easy" is always right, "hard" never; the scores on top are those of the first."""
    easy, hard = (
        replace(one, spec=replace(one.spec, name=name), prompts=one.prompts[:count])
        for one, name, count in ((held_out_set(), "easy", 2), (held_out_set(), "hard", 3))
    )
    hard = replace(hard, prompts=tuple(replace(prompt, answer="5") for prompt in hard.prompts))
    scores = evaluator(FakeEngine(lambda prompt, rng: [1, 2]), tmp_path, easy, hard).run("step_000002")
    assert (scores["pass@1"], scores["problems"]) == (1.0, 2)
    assert {name: (one["pass@1"], one["problems"]) for name, one in scores["sets"].items()} == {
        "easy": (1.0, 2),
        "hard": (0.0, 3),
    }
    assert {path.name for path in tmp_path.glob("*.jsonl")} == {"step_000002_easy.jsonl", "step_000002_hard.jsonl"}


def test_two_evaluations_ask_for_the_same_and_training_for_other_seeds(tmp_path: Path) -> None:
    from owpo_megatron.trainer.drawing import sample_seed

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
    plan = StagePlan.of(ReferenceConfig(refresh="fixed", every=2), steps=6)
    assert [plan.stage(5), plan.step_in_stage(5), plan.stage_steps(5)] == [0, 5, 6]
    assert not any(plan.swap_due(done) for done in range(1, 7))


@pytest.mark.parametrize(
    ("interval", "at_end", "due"),
    [(2, False, [2, 4]), (2, True, [2, 4, 5]), (0, True, [5]), (0, False, []), (5, True, [5])],
)
def test_due_every_so_many_steps(interval: int, at_end: bool, due: list[int]) -> None:
    assert [done for done in range(6) if due_every(interval, done, at_end, steps=5)] == due
