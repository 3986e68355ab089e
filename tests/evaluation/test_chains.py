"""CoT-Pass@k: which responses the second rule sees, the scores by hand, interruptions, judges that fail, mistakes.

Engine and rules are made up; a judge's request is tested in tests/verifiers/test_judge_rule.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine
from test_drawing import BreakingEngine
from tiny import make_config

from owpo_megatron.config import Config, SetConfig
from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.evaluation.chains import check_chains
from owpo_megatron.evaluation.draw import Answering, evaluate_set, identity
from owpo_megatron.evaluation.prepare import PreparedSet, held_out
from owpo_megatron.evaluation.results import Results
from owpo_megatron.evaluation.sets import EvalSet, resolve, sets_of_run
from owpo_megatron.report.scores import Scored, score_tables
from owpo_megatron.trainer.evaluate import Evaluator
from owpo_megatron.types import GradingItem, Prompt, VerdictReason
from owpo_megatron.verifiers import DirectVerifier

TEXTS = {1: "sound #### 1", 3: "lucky #### 1", 0: "sound #### 2"}
PROBLEMS = [Prompt(f"q/{index}", (index,), "", "1") for index in range(3)]
# Four samples each: all right and sound; two right, one of them sound; one right by luck.
DRAWN = {"q/0": (1, 1, 1, 1), "q/1": (1, 3, 0, 0), "q/2": (0, 3, 0, 0)}
CHAIN = "python:test_chains:sound"


def sound(response: str, answer: str) -> bool:
    return "sound" in response


def answers(item: GradingItem) -> VerdictReason:
    return "ok" if item.response.endswith(f"#### {item.answer}") else "wrong"


class Judge(DirectVerifier):
    """Judges reasoning, and notes what it was asked."""

    def __init__(self, says: Any = None):
        super().__init__({"default": says or (lambda item: "ok" if sound(item.response, item.answer) else "wrong")})
        self.asked: list[str] = []

    def submit(self, items: Iterable[GradingItem]) -> Any:
        items = list(items)
        self.asked += [item.response for item in items]
        return super().submit(items)


def prepared(**fields: Any) -> PreparedSet:
    wants = {"samples": 4, "pass_at": [1, 2], "chain": CHAIN} | fields
    return held_out(sets_of_run(make_config(Path("m"), eval=wants).eval, "gsm8k")[0], PROBLEMS, "data")


def drawing(per_call: int | None = None) -> FakeEngine:
    seen: dict[str, int] = {}

    def respond(prompt: Prompt, rng: object) -> list[int]:
        place = seen.setdefault(prompt.id, 0)
        seen[prompt.id] += 1
        return [DRAWN[prompt.id][place % 4], 2]

    return FakeEngine(respond) if per_call is None else BreakingEngine(respond, per_call)


def answering(engine: FakeEngine, judge: Judge | None) -> Answering:
    verifier = DirectVerifier({"default": answers})
    return Answering(engine, verifier, lambda ids: TEXTS[ids[0]], (2,), 8, seed=1, chains=judge)


def evaluate(one: PreparedSet, engine: FakeEngine, judge: Judge | None, folder: Path) -> dict[str, Any]:
    return evaluate_set(one, answering(engine, judge), Results(folder, "mine", identity(one, "w", 8, 1), True))


def test_scores_by_hand(tmp_path: Path) -> None:
    """Right 4, 2, 1 of 4, of these sound 4, 1, 0. k = 2: 1 - C(4 - c, 2) / 6 is 1, 5/6, 1/2 for c = 4, 2, 1."""
    judge = Judge()
    scores = evaluate(prepared(), drawing(), judge, tmp_path)
    found = {name: one["value"] for name, one in scores["metrics"].items()}
    assert found == {
        "pass@1": pytest.approx(7 / 12),
        "cot_pass@1": pytest.approx(5 / 12),
        "pass@2": pytest.approx((1 + 5 / 6 + 1 / 2) / 3),
        "cot_pass@2": pytest.approx((1 + 1 / 2 + 0) / 3),
    }
    assert list(found) == ["pass@1", "cot_pass@1", "pass@2", "cot_pass@2"]
    assert scores["chains"] == {"ok": 5, "wrong": 2} and scores["verdicts"] == {"ok": 7, "wrong": 5}
    assert sorted(judge.asked) == ["lucky #### 1"] * 2 + ["sound #### 1"] * 5, "wrong answers are not judged"
    lines = [json.loads(text) for text in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert lines[1]["chains"] == ["ok", "wrong", None, None] and lines[2]["chains"] == [None, "wrong", None, None]
    assert scores["settings"]["chain"] == CHAIN


def test_without_a_rule_nothing_is_asked_or_written(tmp_path: Path) -> None:
    judge, plain = Judge(), prepared(chain=None)
    scores = evaluate(plain, drawing(), judge, tmp_path)
    assert list(scores["metrics"]) == ["pass@1", "pass@2"] and "chains" not in scores and judge.asked == []
    assert "chains" not in (tmp_path / "mine.jsonl").read_text() and "chain" not in identity(plain, "w", 8, 1)
    with pytest.raises(UserError, match="belong to another evaluation .*chain"):
        evaluate(prepared(), drawing(), judge, tmp_path)


def test_an_interruption_loses_no_verdict_on_reasoning(tmp_path: Path) -> None:
    """The engine breaks after 6 of 12 samples: the judge's verdicts on these are on disk, and it is asked no more."""
    one, engine = prepared(), drawing(6)
    first, second = Judge(), Judge()
    with pytest.raises(EngineError):
        evaluate(one, engine, first, tmp_path)
    kept = [json.loads(text) for text in (tmp_path / "mine.part.jsonl").read_text().splitlines()[1:]]
    assert len(kept) == 6 and sum(line["reason"] == "ok" for line in kept) == len(first.asked) > 0
    assert all(("chain" in line) == (line["reason"] == "ok") for line in kept)
    scores = evaluate(one, drawing(1000), second, tmp_path)
    assert sum(scores["chains"].values()) == len(first.asked) + len(second.asked) == scores["verdicts"]["ok"]


def test_a_judge_that_never_answers_is_an_error_and_costs_a_second_try(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval.chain = python:test_chains:sound: no answer could be graded \(7 timeou"):
        evaluate(prepared(), drawing(), Judge(lambda item: "timeout"), tmp_path)
    assert len((tmp_path / "mine.part.jsonl").read_text().splitlines()) == 1 + 5, "wrong answers stay"
    assert evaluate(prepared(), drawing(), Judge(), tmp_path)["last_call"]["samples"] == 7


def test_one_that_fails_now_and_then_does_not_accept(tmp_path: Path) -> None:
    judge = Judge(lambda item: "crashed" if "lucky" in item.response else "ok")
    scores = evaluate(prepared(), drawing(), judge, tmp_path)
    assert scores["chains"] == {"crashed": 2, "ok": 5} and scores["metrics"]["cot_pass@1"]["value"] == 5 / 12


def test_inside_a_run(tmp_path: Path) -> None:
    scores = Evaluator([prepared()], answering(drawing(), Judge()), tmp_path).run("step_000003")
    assert scores["pass@1"] == pytest.approx(7 / 12) and scores["cot_pass@1"] == pytest.approx(5 / 12)


def test_tables_have_it_beside_the_plain_score(tmp_path: Path) -> None:
    scores = evaluate(prepared(pass_at=[1]), drawing(), Judge(), tmp_path)
    (table,) = score_tables([Scored("Qwen", "owpo", "best", {"mine": scores})])
    assert table.title == "best checkpoint: Pass@1 and CoT-Pass@1"
    assert [heading for _, heading in table.columns] == ["Pass@1", "CoT-Pass@1"]
    assert [round(cell, 2) for cell in table.cells[0] if cell is not None] == [58.33, 41.67]


def test_a_set_has_its_own_rule_or_that_of_the_section() -> None:
    wants = make_config(Path("m"), eval={"chain": CHAIN, "sets": ["aime24", {"name": "amc", "chain": "judge:a.yaml"}]})
    assert [one.chain for one in sets_of_run(wants.eval, "auto")] == [CHAIN, "judge:a.yaml"]
    assert resolve(SetConfig(name="aime24")).chain is None


@pytest.mark.parametrize("rule", ["math", "auto", "judge:"])
def test_a_built_in_rule_judges_no_reasoning(rule: str) -> None:
    raw = {"model": {"path": "m"}, "data": {"source": "task:cipher"}, "eval": {"chain": rule}}
    with pytest.raises(UserError, match=f"eval.chain = {rule}: the built-in rules judge answers alone; use judge:FILE"):
        Config.build(raw)
    with pytest.raises(UserError, match=f"eval.chain = {rule}: the built-in rules judge answers alone"):
        check_chains([EvalSet("mine", "mine", chain=rule)], proxy=False)


def test_a_rule_that_does_not_exist_is_named_before_an_engine_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="eval.chain = python:test_chains:nothing: make it importable"):
        check_chains([EvalSet("mine", "mine", chain="python:test_chains:nothing")], proxy=False)
    (tmp_path / "judge.yaml").write_text("url: nowhere\n")
    with pytest.raises(UserError, match="judge.yaml: url = nowhere"):
        check_chains([EvalSet("mine", "mine", chain=f"judge:{tmp_path / 'judge.yaml'}")], proxy=False)
    check_chains([EvalSet("mine", "mine", chain=CHAIN), replace(EvalSet("b", "b"), chain=None)], proxy=False)
