"""Responses that are cut on a real SGLang server, and continued from their tokens.

Not covered: CUDA, several engines, a cut in the same moment as a push of weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from owpo_megatron.config import SyncConfig
from owpo_megatron.engine import Fleet
from owpo_megatron.sync import make_sync
from owpo_megatron.types import Prompt, Rollout, SampleRequest, Sampling

pytestmark = pytest.mark.server

PROMPTS = [Prompt(f"p/{i}", tuple(3 + (7 * i + 5 * j) % 90 for j in range(4 + 5 * i)), "", "") for i in range(4)]
REQUESTS = [SampleRequest(PROMPTS[i // 4], seed=2**20 + 31 * i) for i in range(16)]
SHORT, LONG = Sampling(8, stop_token_ids=(2,)), Sampling(200, stop_token_ids=(2,))


def test_the_rest_is_cut_and_goes_on_as_if_it_had_not_been(engine: Fleet, tiny_model: Path, tmp_path: Path) -> None:
    """Four short responses are enough; twelve long ones are cut. With the weights and seeds of before, their
    continuation is what an uncut draw gives; the log-probs, of a prompt that is longer by as much, within 1e-4."""
    weights = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    make_sync(SyncConfig(), engine.clients, tmp_path).push(weights.items(), version=1)
    requests = [replace(one, sampling=SHORT if index % 4 == 0 else LONG) for index, one in enumerate(REQUESTS)]
    uncut = engine.generate(requests, LONG)
    complete: list[Rollout] = []

    def note(first: int, rollouts: object) -> None:
        complete.extend(one for one in rollouts if one.finish_reason != "abort")  # type: ignore[attr-defined]

    drawn = engine.draw_until(requests, LONG, lambda: len(complete) >= 4, finished=note)
    cut = [index for index, one in enumerate(drawn) if one.finish_reason == "abort"]
    assert len(cut) >= 4 and sum(len(drawn[index].response_ids) for index in cut) > 0
    assert [len(one.behaviour_logp) for one in drawn] == [len(one.response_ids) for one in drawn]
    left = [
        SampleRequest(
            requests[index].prompt.begun(drawn[index].response_ids),
            requests[index].seed,
            replace(LONG, max_tokens=LONG.max_tokens - len(drawn[index].response_ids)),
        )
        for index in cut
    ]
    rest = dict(zip(cut, engine.generate(left, LONG), strict=True))
    for index, whole in enumerate(uncut):
        one = drawn[index]
        ids, logps = list(one.response_ids), list(one.behaviour_logp)
        if index in rest:
            ids, logps = ids + list(rest[index].response_ids), logps + list(rest[index].behaviour_logp)
        assert ids == list(whole.response_ids)
        assert logps == pytest.approx(list(whole.behaviour_logp), abs=1e-4)


def test_nobody_else_is_cut(engine: Fleet) -> None:
    """Cutting names samples: those that are drawn for somebody else meanwhile stay whole."""
    import threading

    others: list[list[Rollout]] = []
    thread = threading.Thread(target=lambda: others.append(engine.generate(REQUESTS[:4], Sampling(60))))
    thread.start()
    drawn = engine.draw_until(REQUESTS[4:], Sampling(200), lambda: True)
    thread.join()
    assert "abort" in {one.finish_reason for one in drawn}
    assert {one.finish_reason for one in others[0]} <= {"length", "stop"}
