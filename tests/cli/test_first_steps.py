"""Obstacles of newcomers that no other test covers; docs/newcomers.md lists all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from owpo_megatron.api.evaluation_jobs import _like_the_run, _set
from owpo_megatron.cli.running import _kept_by
from owpo_megatron.config import Config, SetConfig
from owpo_megatron.data.small_tokenizers import make_byte_tokenizer
from owpo_megatron.data.templates import PromptTemplate
from owpo_megatron.data.tokenizer import Tokenizer
from owpo_megatron.engine.generation import Generation
from owpo_megatron.evaluation.sets import SETS, resolve
from owpo_megatron.evaluation.targets import Target
from owpo_megatron.trainer.console import RunConsole
from owpo_megatron.types import Prompt, SampleRequest, Sampling


def test_a_stop_names_what_was_kept(tmp_path: Path) -> None:
    assert "nothing was kept" in _kept_by(tmp_path)
    folder = tmp_path / "checkpoints" / "step_000020"
    folder.mkdir(parents=True)
    assert "nothing was kept" in _kept_by(tmp_path), "a folder without its manifest is no checkpoint"
    (folder / "manifest.json").touch()
    assert _kept_by(tmp_path) == "stopped; saved up to step 20, and the same command resumes there"


def test_rank_0s_stderr_stays_out_of_the_rows() -> None:
    """Output goes to rank_0.log: rich would print library warnings between the steps on a terminal."""
    console = RunConsole(3)
    assert console._bars.live._redirect_stderr is False


def test_requests_in_flight_are_counted_per_engine() -> None:
    requests = [SampleRequest(Prompt(str(index), (1,), "", ""), index) for index in range(64)]
    clients: list[Any] = [object() for _ in range(4)]
    generation = Generation(
        clients, requests, Sampling(4), samples_per_post=2, concurrency=8, give_up=lambda engine: None,
        bring_back=lambda engine, error: None,
    )  # fmt: skip
    assert generation.lanes_per_engine == 4, "8 samples in flight on each of the 4 engines"


@pytest.fixture
def target(tmp_path: Path) -> Target:
    raw = {
        "model": {"path": "m"},
        "data": {"source": "train.jsonl", "template": "raw"},
        "verifier": {"rule": "python:my_rules:exact"},
        "eval": {"samples": 4, "pass_at": [1, 2], "temperature": 0.7},
    }
    return Target("base", "owpo", ("converged",), tmp_path, Config.build(raw), tmp_path / "out")


def test_a_file_of_ones_own_is_graded_and_sampled_as_the_run_does(target: Target, tmp_path: Path) -> None:
    file = tmp_path / "held.jsonl"
    lines = [{"problem": "1+1?", "answer": "2"}, {"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": "4"}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    wanted = SetConfig(name="held", source=str(file))
    spec = _like_the_run(resolve(wanted), wanted, target)
    assert (spec.rule, spec.samples, spec.pass_at, spec.temperature) == ("python:my_rules:exact", 4, (1, 2), 0.7)
    template = PromptTemplate("raw", Tokenizer(make_byte_tokenizer()))
    prepared = _set(spec, target, None, template, target.config.data, seed=0)
    assert [prompt.text for prompt in prepared.prompts] == ["1+1?", "2+2?"], "the repeat is left out, nothing is added"
    assert set(prepared.rules.values()) == {"python:my_rules:exact"}
    known = SetConfig(name="aime24")
    assert _like_the_run(resolve(known), known, target) == SETS["aime24"]
