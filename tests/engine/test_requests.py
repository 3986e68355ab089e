"""Requests to an engine and its command line; no server needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_config

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine.answers import (
    UNKNOWN_VERSION,
    BadAnswer,
    Expected,
    read_answer,
    read_answers,
    version_name,
)
from owpo_megatron.engine.command import command_line, environment, server_arguments, server_raw, server_variables
from owpo_megatron.engine.generate_body import generate_body
from owpo_megatron.engine.generation import samples_per_post
from owpo_megatron.engine.parsing import parse_answer
from owpo_megatron.errors import UserError
from owpo_megatron.types import Prompt, SampleRequest, Sampling

PROMPT = Prompt("a/1", (5, 6, 7), "abc", "c")


def answer(**meta: Any) -> dict[str, Any]:
    shared = {
        "output_token_logprobs": [[-0.5, 11, None], [-1.25, 2, None]],
        "finish_reason": {"type": "stop", "matched": 2},
        "weight_version": "9",
        "weight_versions": [{"version": "7", "start": 0, "end": 1}, {"version": "8", "start": 1, "end": 2}],
    }
    return {"output_ids": [11, 2], "meta_info": shared | meta}


def test_each_sample_has_its_own_seed_and_top_k_is_off() -> None:
    requests = [SampleRequest(PROMPT, 41), SampleRequest(PROMPT, 2**62)]
    body = generate_body(requests, Sampling(max_tokens=3, temperature=0.7, top_p=0.9, stop_token_ids=(4,)))
    assert body["input_ids"] == [[5, 6, 7], [5, 6, 7]]
    shared = {"max_new_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": -1, "stop_token_ids": [4]}
    assert body["sampling_params"] == [{**shared, "sampling_seed": 41}, {**shared, "sampling_seed": 2**62}]
    assert body["return_logprob"] is True and "rid" not in body
    assert generate_body(requests, Sampling(3), ["a", "b"])["rid"] == ["a", "b"]
    assert generate_body(requests[:1], Sampling(3), ["a"])["rid"] == "a"
    json.dumps(body)


def test_rollout_carries_the_servers_ids_and_the_last_tokens_version() -> None:
    rollout = read_answer(answer(), SampleRequest(PROMPT, 41))
    assert rollout.response_ids == (11, 2)
    assert rollout.behaviour_logp == (-0.5, -1.25)
    assert (rollout.policy_version, rollout.finish_reason, rollout.seed) == (8, "stop", 41)


def test_flat_answers_have_the_same_tokens() -> None:
    """The client's parser makes one list of them."""
    told = [answer(), answer(output_token_logprobs=[[-2.5e-7, 3, None]], weight_versions=None) | {"output_ids": [3]}]
    content = json.dumps(told, separators=(",", ":")).encode()
    flat = parse_answer(content)
    assert flat[0]["meta_info"]["output_token_logprobs"] == [-0.5, 11, -1.25, 2]
    requests = [SampleRequest(PROMPT, 1), SampleRequest(PROMPT, 2)]
    assert read_answers(flat, requests, Sampling(9), Expected()) == read_answers(
        told, requests, Sampling(9), Expected()
    )


@pytest.mark.parametrize(
    "logprobs",
    [
        [],
        [[-0.5, 11, "a"], [-1.0, 2, "],["]],
        [[-0.5, 11], [-1.0, 2]],
        [[-0.5, 11, 7, None], [-1.0, 2, 7, None]],
        [[None, 11, None]],
        [[float("nan"), 11, None]],
        {"a": [[-0.5, 11, None]]},
    ],
)
def test_other_answers_are_parsed_as_they_are(logprobs: Any) -> None:
    """Neither entries of other lengths nor texts are taken for pairs; keys in texts are texts."""
    told = {"text": '"output_token_logprobs":[[1,2,null]]', "meta_info": {"output_token_logprobs": logprobs}}
    for separators in ((",", ":"), (", ", ": ")):
        found = parse_answer(json.dumps(told, separators=separators).encode())
        kept = found["meta_info"]["output_token_logprobs"]
        flat = [value for entry in logprobs for value in entry[:2]]
        assert repr(kept) in (repr(logprobs), repr(flat) if all(len(entry) == 3 for entry in logprobs) else "")
        assert found["text"] == told["text"]


def test_each_token_has_the_version_that_sampled_it() -> None:
    mixed = read_answer(answer(), SampleRequest(PROMPT, 41))
    assert mixed.versions == mixed.spans == ((7, 1), (8, 1))
    one = read_answer(answer(weight_versions=[{"version": "8", "start": 0, "end": 2}]), SampleRequest(PROMPT, 41))
    assert one.versions == () and one.spans == ((8, 2),)
    with pytest.raises(BadAnswer, match=r"weight versions \(\(7, 1\), \(8, 2\)\) of 2 tokens"):
        spans = [{"version": "7", "start": 0, "end": 1}, {"version": "8", "start": 1, "end": 3}]
        read_answer(answer(weight_versions=spans), SampleRequest(PROMPT, 41))


@pytest.mark.parametrize(
    ("changed", "reason", "tokens"),
    [
        ({}, "abort", 2),
        ({"sampling": Sampling(9, stop_token_ids=(2,))}, "stop", 2),
        ({"sampling": Sampling(2)}, "length", 2),
        ({"output_ids": []}, "abort", 0),
        ({"output_token_logprobs": None}, "abort", 0),
    ],
)
def test_a_sample_that_was_cut(changed: dict[str, Any], reason: str, tokens: int) -> None:
    """Take it as complete where its last token completes it, as empty without one; where nobody cut, refuse it."""
    told, changed = answer(finish_reason={"type": "abort"}), dict(changed)
    sampling = changed.pop("sampling", Sampling(9))
    for name, value in changed.items():
        (told if name in told else told["meta_info"])[name] = value
    rollout = read_answer(told, SampleRequest(PROMPT, 41), sampling, Expected(may_be_cut=True))
    assert (rollout.finish_reason, len(rollout.response_ids)) == (reason, tokens)
    with pytest.raises(BadAnswer):
        read_answer(told, SampleRequest(PROMPT, 41), sampling, Expected())


def test_version_of_older_and_of_unversioned_servers() -> None:
    request = SampleRequest(PROMPT, 1)
    assert read_answer(answer(weight_versions=None), request).policy_version == 9
    assert read_answer(answer(weight_versions=[], weight_version="default"), request).policy_version == UNKNOWN_VERSION


def test_ids_that_do_not_match_their_logprobs_are_refused() -> None:
    with pytest.raises(BadAnswer, match="a/1 that do not belong together"):
        read_answer({**answer(), "output_ids": [11, 3]}, SampleRequest(PROMPT, 1))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a log-prob that is no number": ({"output_token_logprobs": [[float("nan"), 11], [-1.0, 2]]}, "log-prob nan"),
    "a log-prob of minus infinity": ({"output_token_logprobs": [[-0.5, 11], [float("-inf"), 2]]}, "log-prob -inf"),
    "a log-prob above 0": ({"output_token_logprobs": [[5.0, 11], [-1.0, 2]]}, "log-prob 5"),
    "no log-prob": ({"output_token_logprobs": [[None, 11], [-1.0, 2]]}, "no sample"),
    "a log-prob without an id": ({"output_token_logprobs": [-0.5, 11, -1.0, 2, -1.0]}, "do not belong together"),
    "fewer log-probs than ids": ({"output_token_logprobs": [[-0.5, 11]]}, "do not belong together"),
    "an abort": ({"finish_reason": {"type": "abort"}}, "finish reason 'abort'"),
    "no reason": ({"finish_reason": None}, "no sample"),
    "weights of before": ({"weight_versions": None, "weight_version": "7"}, "weights 7, though 8 were pushed"),
    "weights without a number": ({"weight_versions": None, "weight_version": "foo"}, "weights -1, though 8"),
}


@pytest.mark.parametrize("name", WRONG)
def test_answers_that_cannot_be_right(name: str) -> None:
    meta, complaint = WRONG[name]
    expected = Expected(vocab_size=12, version=8)
    read_answer(answer(), SampleRequest(PROMPT, 1), Sampling(2), expected)
    with pytest.raises(BadAnswer, match=complaint):
        read_answer(answer(**meta), SampleRequest(PROMPT, 1), Sampling(2), expected)


@pytest.mark.parametrize(
    ("meta", "complaint"),
    [
        ({"weight_versions": None, "weight_version": "8-you"}, "weights that another program loaded"),
        ({"weight_versions": None, "weight_version": "8"}, "weights -1, though 8 were pushed"),
        ({"weight_versions": [{"version": "7-you", "start": 0, "end": 1}, {"version": "8-me", "start": 1, "end": 2}]},
         "weights that another program loaded"),
    ],
)  # fmt: skip
def test_weights_of_another_owner_are_refused(meta: dict[str, Any], complaint: str) -> None:
    """Two runs at the same step on one server, whose weights have the same number."""
    expected = Expected(version=8, owner="me")
    right = answer(weight_versions=None, weight_version=version_name(8, "me"))
    assert read_answer(right, SampleRequest(PROMPT, 1), Sampling(2), expected).policy_version == 8
    with pytest.raises(BadAnswer, match=complaint):
        read_answer(answer(**meta), SampleRequest(PROMPT, 1), Sampling(2), expected)


@pytest.mark.parametrize(
    ("ids", "complaint"),
    [([], "no tokens"), ([11, 2, 2], "3 tokens of 2 allowed"), ([11, 12], "token id 12"), ([-5, 2], "token id -5")],
)
def test_tokens_that_cannot_be_right(ids: list[int], complaint: str) -> None:
    wrong = answer(output_token_logprobs=[[-0.5, token] for token in ids]) | {"output_ids": ids}
    with pytest.raises(BadAnswer, match=complaint):
        read_answer(wrong, SampleRequest(PROMPT, 1), Sampling(2), Expected(vocab_size=12))


@pytest.mark.parametrize(
    ("answers", "complaint"),
    [([1, 2], "no sample: 1"), ({"message": "<html>"}, "no list of 2 answers"), ([answer()], "1 answers to 2")],
)
def test_garbage_instead_of_answers(answers: Any, complaint: str) -> None:
    requests = [SampleRequest(PROMPT, 1), SampleRequest(PROMPT, 2)]
    with pytest.raises(BadAnswer, match=complaint):
        read_answers(answers, requests, Sampling(2), Expected())


def test_a_long_answer_is_shown_by_its_beginning() -> None:
    with pytest.raises(BadAnswer, match=r"no sample: x{120}\.\.\. \(500 characters\)"):
        read_answers(["x" * 500], [SampleRequest(PROMPT, 1)], Sampling(2), Expected())


@pytest.mark.parametrize(
    ("samples", "engines", "max_tokens", "expected"),
    [(128, 1, 8, 64), (128, 4, 8, 32), (8192, 8, 8192, 1), (8192, 8, 1024, 4), (3, 2, 8, 2), (1, 4, 8, 1)],
)
def test_short_samples_travel_together_and_long_ones_alone(
    samples: int, engines: int, max_tokens: int, expected: int
) -> None:
    assert samples_per_post(samples, engines, Sampling(max_tokens)) == expected


def test_raw_arguments_override_the_defaults() -> None:
    raw = {"max_total_tokens": 99, "sleep_on_idle": False, "lora_paths": ["a", "b"], "json_thing": {"x": 1}}
    arguments = server_arguments(EngineConfig(device="cpu"), Path("/m"), "float32", raw)
    command = command_line(Path("/p"), arguments)
    assert command[0] == "/p" and command[1].endswith("bound_store.py") and command[2] == "sglang.launch_server"
    text = " ".join(command)
    assert "--max-total-tokens 99" in text and "--lora-paths a b" in text and '--json-thing {"x": 1}' in text
    assert "--sleep-on-idle" not in text
    assert "--gc-threshold 700 10 10" in text, "bound_store.py would leave the collector as it is, which takes a second"
    assert "--enable-deterministic-inference --" in text, "a flag that is set carries no value"


def test_cuda_server_keeps_sglangs_own_backends() -> None:
    arguments = server_arguments(EngineConfig(device="cuda", tp=4), Path("/m"), "bfloat16", {})
    assert arguments["tp_size"] == 4
    assert "attention_backend" not in arguments and "max_total_tokens" not in arguments


@pytest.mark.parametrize(
    ("deterministic", "device", "asked"),
    [("auto", "cpu", 1), (False, "cpu", 1), ("auto", "cuda", 0), (False, "cuda", 0), (True, "cuda", 1)],
)
def test_seeds_cost_a_gpu_its_fast_path(deterministic: bool | str, device: str, asked: int) -> None:
    """SGLang reads seeds in its deterministic mode alone; a CPU keeps them, and gives up the order of its sums."""
    config = make_config(Path("unused"), engine={"device": device}, rollout={"deterministic": deterministic})
    arguments = server_arguments(config.engine, Path("/m"), "bfloat16", server_raw(config))
    assert arguments["enable_deterministic_inference"] == asked
    assert ("OWPO_BATCH_INVARIANT" in server_variables(config)) == (deterministic is False)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("port", "set engine.port"),
        ("tp-size", "set engine.tp"),
        ("weight_version", "remove it"),
        ("api-key", "remove it"),
    ],
)
def test_raw_arguments_with_a_field_of_their_own_are_refused(name: str, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        server_arguments(EngineConfig(device="cpu"), Path("/m"), "float32", {name: 1})


def test_torchruns_variables_do_not_reach_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("SGLANG_SOMETHING", "kept")
    env = environment(EngineConfig(device="cpu", tp=2), tmp_path)
    assert not {"TORCHELASTIC_USE_AGENT_STORE", "MASTER_PORT"} & set(env)
    assert env["SGLANG_SOMETHING"] == "kept"
    assert env["OMP_NUM_THREADS"] == "1", "a model of 0 bytes needs one thread"
    assert env["SGLANG_CPU_OMP_THREADS_BIND"].count("|") == 1
