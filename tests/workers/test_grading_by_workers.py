"""Tests of what a worker grades, and what it leaves to rank 0."""

from __future__ import annotations

import datetime
import errno
import io
import pickle
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest
from tiny import make_config
from transformers import Qwen3Config

from owpo_megatron.carried import carry
from owpo_megatron.config import VerifierConfig
from owpo_megatron.data.small_tokenizers import make_character_tokenizer
from owpo_megatron.engine.replies import EngineGone
from owpo_megatron.trainer.build_data import RunData
from owpo_megatron.trainer.build_drawing import DrawingBuilder
from owpo_megatron.types import GradingItem, Prompt, Rollout, Sampling, Verdict
from owpo_megatron.verifiers import DirectVerifier, KnownVerdicts
from owpo_megatron.verifiers.generated_tasks import grade_cipher
from owpo_megatron.workers import GradingOrder
from owpo_megatron.workers.messages import Ask, Server
from owpo_megatron.workers.process import RolloutWorker

TOKENIZER = make_character_tokenizer("0123456789=")


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[RolloutWorker]:
    TOKENIZER.save_pretrained(tmp_path)
    Qwen3Config(vocab_size=len(TOKENIZER)).save_pretrained(tmp_path)
    order = GradingOrder(VerifierConfig(), tmp_path, frozenset({"cipher"}))
    here, _ = Pipe()
    worker = RolloutWorker(here, order)
    yield worker
    worker.close()


def rollout(text: str, reason: str = "stop", **prompt: object) -> Rollout:
    ids = tuple(TOKENIZER.encode(text))
    made = Prompt("1", (1,), "1+1=", "42", **{"domain": "cipher", **prompt})  # type: ignore[arg-type]
    return Rollout(made, ids, (-0.5,) * len(ids), 0, reason, 1)  # type: ignore[arg-type]


def test_whole_responses_of_known_domains_are_graded(worker: RolloutWorker) -> None:
    """A response that was cut goes on later; a domain without a rule is one that rank 0 asks about itself."""
    drawn = [rollout("42"), rollout("41"), rollout("4", "abort"), rollout("42", domain="other")]
    graded = worker._graded(drawn)
    assert [one.verdict and one.verdict.reason for one in graded] == ["ok", "wrong", None, None]
    assert all(one.prompt.id == "" for one in graded), "rank 0 has the prompts"
    assert [replace(one, prompt=other.prompt) for one, other in zip(graded, drawn, strict=True)] == drawn


def test_a_response_that_the_prompt_began_is_graded_as_a_whole(worker: RolloutWorker) -> None:
    begun = rollout("2")
    prompt = begun.prompt.begun(TOKENIZER.encode("4"))
    assert [one.verdict and one.verdict.reason for one in worker._graded([replace(begun, prompt=prompt)])] == ["ok"]


def test_a_known_verdict_is_not_asked_for_again() -> None:
    """Its text is not even decoded, but where someone else reads it."""
    known = Verdict(False, "timeout", 4.0)
    answers = [rollout("42"), replace(rollout("42"), verdict=known)]
    items = [GradingItem.of(one, TOKENIZER.decode) for one in answers]
    assert [item.response for item in items] == ["42", ""]
    assert GradingItem.of(answers[1], TOKENIZER.decode, text=True).response == "42"
    verdicts = KnownVerdicts(DirectVerifier({"cipher": grade_cipher})).score(items)
    assert verdicts[0].correct and verdicts[1] is known


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), EngineGone("http://e", " is gone")])
def test_an_error_is_answered_though_nothing_can_be_written(
    worker: RolloutWorker, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk of the log is full. Without an answer, rank 0 would wait for ever."""

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    here, there = Pipe()
    monkeypatch.setattr(worker, "_connection", here)
    monkeypatch.setattr(sys, "stderr", Full())
    drawn = Future[list[Rollout]]()
    drawn.set_exception(error)
    worker._finish(Ask(3, Server("http://e", None, 1.0, None, "", None), [], Sampling(4), None, None), drawn)
    assert there.poll(10)
    answer = there.recv()
    assert answer.number == 3
    if isinstance(error, EngineGone):
        assert type(answer.error) is EngineGone and answer.error.url == error.url
    else:
        assert str(answer.error) == "a rollout worker failed: ZeroDivisionError: x"


@pytest.mark.process
def test_a_rule_of_a_notebook_comes_by_value(worker: RolloutWorker, tmp_path: Path) -> None:
    """`train(..., verifier=lambda ...)`: no other process can import it. It is graded in the worker's own processes."""
    with carry({"python:__main__:ends_in_two": lambda response, answer: response.endswith("2")}):
        made = make_config(tmp_path, verifier={"rule": "python:__main__:ends_in_two", "workers": 1})
        data = RunData(datetime.date(2026, 1, 1), prompts=(rollout("42").prompt,))
        order = DrawingBuilder(made, data, None, print, ExitStack()).grading_order(tmp_path)
    order = pickle.loads(pickle.dumps(order))
    with closing(RolloutWorker(Pipe()[0], order)) as other:
        graded = other._graded([rollout("42"), rollout("41")])
    assert [one.verdict and one.verdict.reason for one in graded] == ["ok", "wrong"]
