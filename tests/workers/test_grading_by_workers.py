"""Tests of what a worker grades, and what it leaves to rank 0."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest
from transformers import Qwen3Config

from owpo_megatron.config import VerifierConfig
from owpo_megatron.data.small_tokenizers import make_character_tokenizer
from owpo_megatron.types import GradingItem, Prompt, Rollout, Verdict
from owpo_megatron.verifiers import DirectVerifier, KnownVerdicts
from owpo_megatron.verifiers.generated_tasks import grade_cipher
from owpo_megatron.workers import GradingOrder
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
