"""Texts that end a response, on a real server: it has a tokenizer then, and keeps the text that ended the response.

Not covered: servers that others start without a tokenizer; SGLang refuses such a request, naming its option.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_config, make_hf_model

from owpo_megatron.config import EngineConfig
from owpo_megatron.data import load_tokenizer
from owpo_megatron.data.small_tokenizers import make_byte_tokenizer
from owpo_megatron.engine.command import server_raw
from owpo_megatron.engine.generate_body import generate_body
from owpo_megatron.engine.server import Server
from owpo_megatron.types import Prompt, SampleRequest, Sampling

STOP = ("e", "Zz")


def test_only_runs_with_such_texts_load_a_tokenizer():
    plain = make_config(Path("unused"))
    assert "skip_tokenizer_init" not in server_raw(plain)
    assert server_raw(make_config(Path("unused"), rollout={"stop": ["e"]}))["skip_tokenizer_init"] is False
    body = generate_body([SampleRequest(Prompt("1", (5,), "x", ""), 1)], Sampling(4, stop=STOP))
    assert body["sampling_params"]["stop"] == list(STOP) and body["sampling_params"]["no_stop_trim"]
    without = generate_body([SampleRequest(Prompt("1", (5,), "x", ""), 1)], Sampling(4))["sampling_params"]
    assert not {"stop", "no_stop_trim"} & without.keys()


@pytest.mark.server
def test_a_response_ends_with_the_token_that_completes_the_text(engine_python, tmp_path):
    """About one byte in 250 of a random model is an `e`: some responses end so, none goes on behind one."""
    model = make_hf_model(tmp_path / "model", vocab_size=272, eos_token_id=0)
    make_byte_tokenizer(272).save_pretrained(model)
    tokenizer = load_tokenizer(model)
    config = make_config(Path("unused"), rollout={"stop": list(STOP)})
    engine = EngineConfig(python=engine_python, device="cpu")
    server = Server(engine, model, "float32", server_raw(config), tmp_path / "engine.log")
    try:
        server.start()
        requests = [SampleRequest(Prompt(str(n), (70 + n, 80), "", ""), n) for n in range(24)]
        rollouts = server.client.generate(requests, Sampling(96, stop=STOP))
    finally:
        server.close()
    ended = 0
    for rollout in rollouts:
        before = tokenizer.decode_all(rollout.response_ids[:-1])
        whole = tokenizer.decode_all(rollout.response_ids)
        assert not any(text in before for text in STOP)
        assert len(rollout.behaviour_logp) == len(rollout.response_ids)
        if any(text in whole for text in STOP):
            ended += 1
            assert rollout.finish_reason == "stop"
    assert ended > 0, "no response had one of the texts"
