"""Drawing and grading a set: scores, what is kept, what an interruption costs. Only the engine is made up."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine
from test_sets import GPQA

from owpo_megatron.config import SetConfig, VerifierConfig
from owpo_megatron.data import PromptTemplate, Tokenizer
from owpo_megatron.data.small_tokenizers import make_byte_tokenizer
from owpo_megatron.errors import EngineError, UserError
from owpo_megatron.evaluation.draw import Answering, evaluate_set, identity, sample_seed
from owpo_megatron.evaluation.prepare import PreparedSet, prepare
from owpo_megatron.evaluation.results import Results
from owpo_megatron.evaluation.sets import SETS, resolve
from owpo_megatron.types import Finished, Progress, Prompt, Rollout, SampleRequest, Sampling
from owpo_megatron.verifiers import make_verifier

pytestmark = pytest.mark.process

TOKENIZER = Tokenizer(make_byte_tokenizer())


class BreakingEngine(FakeEngine):
    """Returns some samples per call, in posts of three, and then breaks."""

    def __init__(self, respond: Any, samples_a_call: int):
        super().__init__(respond)
        self._samples = samples_a_call
        self.drawn: list[tuple[str, int]] = []

    def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        progress: Progress | None = None,
        finished: Finished | None = None,
    ) -> list[Rollout]:
        rollouts = [self._draw(request, sampling) for request in requests]
        assert finished is not None
        starts = list(range(0, len(requests), 3))
        random.Random(1).shuffle(starts)  # posts end in any order
        handed_over = 0
        for start in starts:
            post = rollouts[start : start + 3]
            self.drawn += [(rollout.prompt.id, rollout.seed) for rollout in post]
            finished(start, post)
            handed_over += len(post)
            if handed_over >= self._samples:
                raise EngineError("the engine is gone")
        return rollouts


def respond(prompt: Prompt, rng: random.Random) -> Sequence[int]:
    """Right with a chance that depends on the problem; ends at once or runs into the limit."""
    right = rng.random() < int(prompt.id) / 4
    text = f"So \\boxed{{{prompt.answer if right else 77}}}" + ("" if rng.random() < 0.8 else "." * 40)
    return [*TOKENIZER.encode(text), TOKENIZER.eos_ids[0]]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    """Five problems of six samples."""
    file = tmp_path_factory.mktemp("set") / "mine.jsonl"
    file.write_text("".join(json.dumps({"id": i, "problem": f"{i}?", "answer": 10 + i}) + "\n" for i in range(5)))
    spec = resolve(SetConfig(name="mine", source=str(file), samples=6, pass_at=[1, 3]))
    return prepare(spec, str(file), PromptTemplate("raw", TOKENIZER), seed=0)


def evaluate(ready: PreparedSet, engine: FakeEngine, folder: Path, **changes: Any) -> dict[str, Any]:
    verifier = make_verifier(VerifierConfig(workers=1), (), dict.fromkeys(ready.rules, "gsm8k") | dict(ready.rules))
    try:
        answering = Answering(engine, verifier, TOKENIZER.decode, TOKENIZER.eos_ids, 40, seed=9)
        settings = identity(ready, "weights", 40, 9) | changes
        results = Results(folder, "mine", settings, keep_responses=not ready.spec.confidential)
        return evaluate_set(ready, answering, results)
    finally:
        verifier.close()


def test_scores_and_what_is_kept(ready: PreparedSet, tmp_path: Path) -> None:
    engine = FakeEngine(respond)
    scores = evaluate(ready, engine, tmp_path)
    lines = [json.loads(text) for text in (tmp_path / "mine.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1", "2", "3", "4"]
    assert all(line["correct"] == line["verdicts"].count("ok") for line in lines)
    assert lines[0]["correct"] == 0 and lines[4]["correct"] >= 4 and len(lines[2]["responses"]) == 6
    right = [line["correct"] for line in lines]
    assert scores["metrics"]["pass@1"]["value"] == pytest.approx(sum(right) / 30)
    low, value, high = (scores["metrics"]["pass@3"][name] for name in ("low", "value", "high"))
    assert low < value < high
    assert (scores["problems"], scores["samples"], sum(scores["verdicts"].values())) == (5, 6, 30)
    assert json.loads((tmp_path / "mine.json").read_text()) == scores
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.json", "mine.jsonl"]
    assert {request.seed for request in engine.calls[0]} == {sample_seed(9, p, s) for p in range(5) for s in range(6)}


def test_the_estimator_changes_the_score_and_is_part_of_the_settings(ready: PreparedSet, tmp_path: Path) -> None:
    """Pass@3 of six samples with replacement is the lower one; results of one are not taken for the other's."""
    other = replace(ready, spec=replace(ready.spec, pass_estimator="bootstrap"))
    plain = evaluate(ready, FakeEngine(respond), tmp_path / "plain")["metrics"]["pass@3"]["value"]
    lower = evaluate(other, FakeEngine(respond), tmp_path / "bootstrap")["metrics"]["pass@3"]["value"]
    right = [json.loads(line)["correct"] for line in (tmp_path / "plain" / "mine.jsonl").read_text().splitlines()]
    assert lower == pytest.approx(sum(1 - (1 - one / 6) ** 3 for one in right) / 5) and lower < plain
    assert "pass_estimator" not in identity(ready, "weights", 40, 9)
    with pytest.raises(UserError):
        evaluate(other, FakeEngine(respond), tmp_path / "plain")


def test_an_interrupted_evaluation_goes_on_where_it_stopped(ready: PreparedSet, tmp_path: Path) -> None:
    """The engine breaks after 9 samples, then after 12, then holds. No sample is drawn twice, the result is the same
    file, byte for byte, as without interruptions; done, nothing is drawn any more."""
    evaluate(ready, FakeEngine(respond), tmp_path / "straight")
    broken, drawn = tmp_path / "broken", []
    for samples in (9, 12, 1000):
        engine = BreakingEngine(respond, samples)
        if samples < 1000:
            with pytest.raises(EngineError):
                evaluate(ready, engine, broken)
            assert not (broken / "mine.json").exists()
        else:
            assert evaluate(ready, engine, broken)["last_call"]["samples"] == 30 - 9 - 12
        drawn += engine.drawn
    assert len(drawn) == len(set(drawn)) == 30
    assert (broken / "mine.jsonl").read_bytes() == (tmp_path / "straight" / "mine.jsonl").read_bytes()
    untouched = BreakingEngine(respond, 1)
    evaluate(ready, untouched, broken)
    assert untouched.drawn == []


def test_a_killed_process_loses_the_line_that_it_was_writing(ready: PreparedSet, tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        evaluate(ready, BreakingEngine(respond, 9), tmp_path)
    part = tmp_path / "mine.part.jsonl"
    whole = part.read_bytes()
    part.write_bytes(whole[:-5])
    engine = BreakingEngine(respond, 1000)
    evaluate(ready, engine, tmp_path)
    assert len(engine.drawn) == 30 - 8
    evaluate(ready, FakeEngine(respond), tmp_path / "straight")
    assert (tmp_path / "mine.jsonl").read_bytes() == (tmp_path / "straight" / "mine.jsonl").read_bytes()


def test_results_of_something_else_are_not_gone_on_with(ready: PreparedSet, tmp_path: Path) -> None:
    with pytest.raises(EngineError):
        evaluate(ready, BreakingEngine(respond, 9), tmp_path)
    for _ in range(2):  # the unfinished ones, then the finished ones
        with pytest.raises(UserError, match=r"\(model weights there, others now\); give another --out, or --fresh"):
            evaluate(ready, FakeEngine(respond), tmp_path, model="others")
        evaluate(ready, FakeEngine(respond), tmp_path)


def test_nothing_of_a_confidential_set_is_kept(tmp_path: Path) -> None:
    """A made-up record in GPQA's schema whose responses repeat the question: no word of either is on disk."""
    file = tmp_path / "gpqa_diamond.jsonl"
    file.write_text(json.dumps(GPQA) + "\n")
    ready = prepare(SETS["gpqa"], str(file), PromptTemplate("completion", TOKENIZER), seed=0)
    engine = FakeEngine(lambda prompt, rng: [*TOKENIZER.encode("made up"), TOKENIZER.eos_ids[0]])
    scores = evaluate(ready, engine, tmp_path / "out")
    kept = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert not any(word in kept for word in ("made up", "all of it", "Question", "responses", "rec1"))
    assert scores["problems"] == 1 and json.loads((tmp_path / "out" / "mine.jsonl").read_text())["verdicts"]


def test_grading_goes_on_while_the_engine_draws(ready: PreparedSet, tmp_path: Path) -> None:
    """Samples are on disk before the last ones are drawn."""
    seen: list[int] = []

    class Watching(FakeEngine):
        def generate(self, requests: Any, sampling: Any, progress: Any = None, finished: Any = None) -> list[Rollout]:
            for index, request in enumerate(requests):
                finished(index, [self._draw(request, sampling)])
                seen.append((tmp_path / "mine.part.jsonl").read_text().count("\n") - 1)
            return []

    evaluate(ready, Watching(respond), tmp_path)
    assert seen[-1] > 0 and seen == sorted(seen)


def test_damaged_results_are_drawn_again_or_named(ready: PreparedSet, tmp_path: Path) -> None:
    """Lines that a disk lost, a sample twice, as two commands at once write it, and scores that are cut short."""
    scores = evaluate(ready, FakeEngine(respond), tmp_path / "straight")
    settings = identity(ready, "weights", 40, 9)
    sample = {"at": [1, 2], "reason": "ok", "length": 3, "truncated": False, "ids": [1, 2, 3]}
    part = tmp_path / "again" / "mine.part.jsonl"
    part.parent.mkdir()
    lines = [json.dumps({"settings": settings}), json.dumps(sample), json.dumps(sample), "\0\0\0", '{"at": [1]}', "[3]"]
    part.write_text("".join(line + "\n" for line in lines))
    found = Results(part.parent, "mine", settings, keep_responses=True)
    assert (len(found), found.right) == (1, 1) and len(part.read_text().splitlines()) == 2
    part.write_text(f"{lines[0]}\n\0\0\n")
    again = evaluate(ready, FakeEngine(respond), part.parent)
    assert again | {"last_call": None} == scores | {"last_call": None}
    for file, content in ((part, "\xff\n" + lines[1] + "\n"), (part.with_name("mine.json"), '{"pass@1": 0.')):
        part.with_name("mine.json").unlink(missing_ok=True)
        file.write_text(content)
        with pytest.raises(UserError, match=r"results = .* is cut short or overwritten; give --fresh"):
            evaluate(ready, FakeEngine(respond), part.parent)
