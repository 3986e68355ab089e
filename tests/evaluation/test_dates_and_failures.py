"""An evaluation that goes on another day, and one of which nothing could be graded."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace

import pytest
from fakes import FakeEngine

from owpo_megatron.config import SetConfig
from owpo_megatron.data import PromptTemplate, Tokenizer
from owpo_megatron.data.small_tokenizers import make_byte_tokenizer
from owpo_megatron.errors import UserError
from owpo_megatron.evaluation.draw import Answering, evaluate_set, identity
from owpo_megatron.evaluation.prepare import prepare
from owpo_megatron.evaluation.results import Results, date_of
from owpo_megatron.evaluation.sets import resolve
from owpo_megatron.run.checkpoints import TRAINER, CheckpointFolder, began_on
from owpo_megatron.types import Verdict
from owpo_megatron.verifiers.grading import Grading

DAY = datetime.date(2026, 2, 3)
TODAY = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"


def made(tmp_path, template=TODAY, date=DAY):
    backend = make_byte_tokenizer(270)
    backend.chat_template = template
    tokenizer = Tokenizer(backend)
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{n}?", "answer": n}) + "\n" for n in range(3)))
    spec = resolve(SetConfig(name="mine", source=str(file), samples=2, pass_at=[1]))
    return prepare(spec, str(file), PromptTemplate("chat", tokenizer, date=date), seed=0), tokenizer


def test_results_keep_the_date_of_their_prompts(tmp_path):
    ready, _ = made(tmp_path)
    assert ready.date == "2026-02-03" and ready.prompts[0].text.startswith("03 Feb 2026 0?")
    settings = identity(ready, "weights", 8, 1)
    assert settings["date"] == "2026-02-03"
    results = Results(tmp_path / "out", "mine", settings, keep_responses=True)
    assert date_of(tmp_path / "out") == DAY and results.scores is None
    plain, _ = made(tmp_path, template="{{ messages[0].content }}")
    assert plain.date == "" and "date" not in identity(plain, "weights", 8, 1)
    assert date_of(tmp_path / "nowhere") is None


def test_other_files_have_no_date(tmp_path):
    for name, text in (("table.json", "[1]"), ("half.json", "{"), ("scores.json", '{"settings": {"seed": 1}}')):
        (tmp_path / name).write_text(text)
    assert date_of(tmp_path) is None


def test_checkpoints_keep_the_day_on_which_their_run_began(tmp_path):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    assert folder.began_on() is None
    for step in (1, 2):
        folder.start(step)
        folder.finish(step, {"step": step, "rollouts": {"date": "2026-02-03"}})
    assert folder.began_on() == began_on(folder.path(1)) == DAY
    (folder.path(2) / TRAINER).write_text('{"step": 2, "rollouts": {}}')
    assert began_on(folder.path(2)) is None, "made before dates were kept"
    assert began_on(tmp_path) is None


class Down:
    """A verifier whose rule cannot be reached, until it can."""

    up = False

    def submit(self, items):
        grading = Grading(len(items))
        for index in range(len(items)):
            verdict = Verdict(True, "ok") if self.up else Verdict(False, "crashed", detail="http://x: refused")
            grading.put(index, verdict)
        return grading


def test_an_evaluation_without_one_verdict_stops_and_keeps_none(tmp_path):
    ready, tokenizer = made(tmp_path)
    ready = replace(ready, rules=dict.fromkeys(ready.rules, "http://x"))
    verifier = Down()
    answering = Answering(FakeEngine(lambda prompt, rng: [5]), verifier, tokenizer.decode, tokenizer.eos_ids, 8, seed=1)

    def evaluate():
        results = Results(tmp_path / "out", "mine", identity(ready, "weights", 8, 1), keep_responses=True)
        return evaluate_set(ready, answering, results)

    with pytest.raises(UserError, match=r"no answer could be graded \(6 crashed\): http://x: refused"):
        evaluate()
    verifier.up = True
    assert evaluate()["verdicts"] == {"ok": 6}, "all are drawn and graded again"
