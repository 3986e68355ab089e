"""`owpo bench step`, `start`, `growth`: the workloads' files, and the real trainer and engine, and TRL where it is.

No figure is checked: what is measured depends on the machine.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from owpo import Owpo

from owpo_megatron.bench import growth
from owpo_megatron.bench.step import OurSide, peers_home
from owpo_megatron.bench.step_rule import correct
from owpo_megatron.bench.step_workload import WORKLOADS, Workload, write_workload
from owpo_megatron.data import load_tokenizer

TINY = replace(WORKLOADS["small"], vocab=64)


def test_every_prompt_has_its_length_and_no_response_can_end(tmp_path: Path) -> None:
    """The end token's probability, under HF's own model, at every place of the prompts."""
    from transformers import AutoModelForCausalLM

    write_workload(tmp_path, TINY)
    tokenizer = load_tokenizer(tmp_path / "policy")
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    ids = [tokenizer.encode(prompt) for prompt in prompts[:8]]
    assert {len(prompt) for prompt in ids} == {TINY.prompt}
    assert tokenizer.eos_ids == (TINY.end,) and TINY.end not in {token for prompt in ids for token in prompt}
    for name in ("policy", "reference"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        with torch.no_grad():
            ends = model(torch.tensor(ids)).logits.softmax(-1)[..., TINY.end]
        assert ends.max() < 1e-9


def test_the_reward_is_the_parity_of_the_response() -> None:
    assert [correct(text) for text in ("t1 t2", "t1 t3", "t7", "")] == [True, False, True, False]


@pytest.mark.extra
@pytest.mark.server
def test_the_command_reports_both_sides(tmp_path: Path) -> None:
    """Against TRL where its environment has been made: the losses on the same tokens agree, or the command fails."""
    has_peer = (peers_home() / ".made").is_file()
    against = ["--against", "trl"] if has_peer else []
    out = tmp_path / "step.json"
    command = ["bench", "step", "--workload", "small", "--pairs", "1", "--json", str(out), *against]
    process = Owpo(tmp_path / "out", *command)
    assert process.wait(600) == 0, process.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["seconds_per_step"] > 0 and found["tokens_per_s"] == pytest.approx(2048 / found["seconds_per_step"])
    assert {"rollout", "logp_ref", "update", "sync"} <= found["phases"].keys()
    assert {"ours: SGLang, scheduler", "ours: ranks of the trainer"} <= found["peak_bytes"].keys()
    if has_peer:
        assert {"rollout", "logp_ref", "update"} == found["peer_phases"].keys()
        assert found["ratio"] == pytest.approx(found["seconds"][0] / found["peer_seconds"][0])
        assert abs(found["loss_on_same_tokens"] - found["peer_loss_on_same_tokens"]) < 1e-5
        assert found["grad_norm"] == pytest.approx(found["peer_grad_norm"], rel=1e-4)


@pytest.mark.extra
@pytest.mark.server
def test_a_start_with_a_warm_engine_leaves_sglangs_seconds_out(tmp_path: Path) -> None:
    out = tmp_path / "start.json"
    process = Owpo(tmp_path / "out", "bench", "start", "--rounds", "1", "--json", str(out))
    assert process.wait(600) == 0, process.stderr[-3000:]
    rows = {row["what"].removesuffix(", CPU seconds"): row for row in json.loads(out.read_text())["rows"]}
    assert rows["SGLang, server"]["own"] > 1 and rows["SGLang, server"]["warm"] == 0
    assert rows["all"]["warm"] < rows["all"]["own"] and rows["ranks of the trainer"]["warm"] > 0


def test_growth_changes_one_size_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds are the tokens, in place of a measurement, so that the ratios are known."""

    def measured(workload: Workload, our: OurSide, steps: int, log: Any) -> dict[str, Any]:
        log("step")
        peaks = {"ours: ranks of the trainer": workload.vocab << 20, "ours: SGLang, scheduler": our.ranks << 20}
        seconds = workload.tokens / our.ranks
        return {"seconds_per_step": seconds, "cpu_seconds_per_step": workload.tokens, "phases": {}, "peak_bytes": peaks}

    monkeypatch.setattr(growth, "bench_step", measured)
    lines: list[str] = []
    rows = growth.bench_growth(WORKLOADS["small"], 1, lines.append)
    assert [row["ratio"] for row in rows] == [1, 2, 1, 2, 0.5, 0.25]
    assert [row["cpu_ratio"] for row in rows] == [1, 2, 1, 2, 1, 1]
    assert [row["rank_peak_mb"] for row in rows] == [512, 512, 2048, 512, 512, 512]
    assert [row["scheduler_peak_mb"] for row in rows] == [1, 1, 1, 1, 2, 4]
    assert lines[1] == "response x 2: step"
