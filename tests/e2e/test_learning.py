"""Whole runs of `owpo train` with a real SGLang server on a CPU: it learns, and what it writes is what is documented.

Not covered: CUDA, bfloat16, several servers.
"""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from owpo import ROOT, Owpo, lines_of, newest_step, steps_of, values, without, write_config
from rank_pool import Ranks
from warm import WarmRun, train

from owpo_megatron.engine import load_rollouts

pytestmark = [pytest.mark.server, pytest.mark.ranks]

STEPS = 8
SIZES: dict[str, Any] = {
    # of the quickstart; swaps after steps 3 and 6, so that steps 4 and 7 begin with the reference being the policy
    "rollout": {"prompts_per_step": 16, "group_size": 8, "max_response_tokens": 8},
    "optimizer": {"steps": STEPS, "updates_per_step": 2, "lr": 4e-4, "warmup_steps": 4, "tokens_per_microbatch": 1024},
    "reference": {"every": 3},
    "parallel": {"tp": 2},
    "eval": {"before": True, "after": True, "samples": 8, "pass_at": [1, 8], "limit": 40},
}


@pytest.fixture(scope="module")
def learned(small: dict[str, Any], server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of eight steps of OWPO on two ranks."""
    here = tmp_path_factory.mktemp("learned")
    layers = (small, SIZES, {"name": "learned", "engine": {"urls": [server_url]}})
    Owpo(here, "train", "-c", str(write_config(here / "run.yaml", *layers))).done(timeout=240)
    return Path(small["runs_dir"]) / "learned"


@pytest.fixture(scope="module")
def summary(learned: Path) -> dict[str, Any]:
    return json.loads((learned / "summary.json").read_text())


def test_it_learns(summary: dict[str, Any], learned: Path) -> None:
    """The quickstart gains 0.2 in six steps at half this learning rate; 0.15 leaves room for chance."""
    assert summary["pass_at_1_after"] > summary["pass_at_1_before"] + 0.15
    rewards = values(steps_of(learned), "reward_mean")
    assert sum(rewards[-2:]) > sum(rewards[:2]) + 0.2


def test_engine_and_trainer_agree_in_every_step(learned: Path) -> None:
    mismatches = values(steps_of(learned), "mismatch")
    assert len(mismatches) == STEPS and max(mismatches) < 1e-4
    assert min(mismatches) > 0, "two programs never agree to the bit; this is not measured"


def test_responses_are_of_the_weights_that_were_pushed_last(learned: Path) -> None:
    steps = steps_of(learned)
    assert values(steps, "policy_version") == [line["step"] - 1 for line in steps]


def test_swaps_and_the_curriculum_between_them(learned: Path, summary: dict[str, Any]) -> None:
    """Stages of 3, 3 and 2 steps of 8 siblings: 8, round(4.5) = 4, 1 and 8, 1."""
    steps = steps_of(learned)
    assert values(steps, "ref_id") == [0, 0, 0, 1, 1, 1, 2, 2]
    assert values(steps, "ref_step") == [0, 0, 0, 3, 3, 3, 6, 6]
    assert values(steps, "n_active") == [8, 4, 1, 8, 4, 1, 8, 1]
    assert summary["swaps"] == 2
    assert summary["reference"] == {"ref_id": 2, "source_step": 6, "reason": "interval"}


def test_the_first_update_after_a_swap_is_unweighted(
    ranks: Ranks, small: dict[str, Any], server_url: str, tmp_path: Path
) -> None:
    """One update a step and a swap after every step: w is exactly 1 and delta exactly 0, in each of them; with a fixed
    reference from the second step on it is not. One rank."""
    found = {}
    for name, reference in (("swapping", {"every": 1}), ("fixed", {"refresh": "fixed"})):
        layers = (small, {"engine": {"urls": [server_url]}, "reference": reference, "name": f"unweighted_{name}"})
        sizes = {
            "optimizer": {"steps": 2, "updates_per_step": 1, "warmup_steps": 0},
            "checkpoint": {"export_hf": False},
        }
        config = write_config(tmp_path / f"{name}.yaml", *layers, sizes)
        train(ranks, config)
        found[name] = steps_of(Path(small["runs_dir"]) / f"unweighted_{name}")
    for line in (*found["swapping"], found["fixed"][0]):
        assert line["w_mean"] == 1.0 and line["abs_delta"] == 0.0 and line["ratio_mean"] == 1.0
        assert sum(line[f"case_{number}"] for number in range(1, 5)) == 0.0
    assert found["fixed"][1]["abs_delta"] > 0.0 and found["fixed"][1]["w_mean"] != 1.0


def documented(heading: str) -> set[str]:
    """Field names in the first column of the table under a heading of docs/metrics.md."""
    section = (ROOT / "docs" / "metrics.md").read_text().partition(heading + "\n")[2].split("\n#")[0]
    rows = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([\w@]+)`", row)}


def test_lines_have_the_documented_fields_and_no_others(learned: Path) -> None:
    wanted = documented("### Step lines") | {"case_2", "case_3"}  # written as a range
    # only after a resume, with max_staleness, or with surplus
    wanted -= {"damaged_checkpoints", "staleness", "generation_seconds", "partial"}
    wanted -= {"turns", "tool_calls", "tool_errors", "observation_tokens", "episodes_ended", "tool_seconds", "kl_whole"}
    for line in (line for line in lines_of(learned) if "seconds" in line):
        assert line.keys() == wanted
        assert {"rollout", "verify", "logp_old", "update", "sync", "total"} <= line["seconds"].keys()
    (before, after) = [line for line in lines_of(learned) if "eval" in line]
    assert (before["step"], after["step"]) == (0, STEPS)
    assert after["eval"].keys() == {"pass@1", "pass@8", "problems", "samples", "response_length"}


def test_the_summary_has_the_documented_fields(summary: dict[str, Any]) -> None:
    assert summary.keys() == documented("## summary.json")
    assert summary["parallel"] == {"tp": 2, "cp": 1, "pp": 1, "dp": 1, "sp": False}
    assert summary["engine"]["name"] == "sglang" and re.fullmatch(r"\d+\.\d+\.\d+\S*", summary["engine"]["version"])
    assert summary["mismatch_max"] < 1e-4 and summary["tokens"] > 1000 and summary["seconds"] > 0


def test_the_exported_folder_is_the_policy_that_sampled_last(learned: Path) -> None:
    """transformers loads it with its tokenizer; its greedy answers are right more often than not after training, and
    an engine's samples of the last weights (the evaluation) are what it gives good probability to."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(learned / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(learned / "hf")
    kept = [json.loads(text) for text in (learned / "eval" / f"step_{STEPS:06d}.jsonl").read_text().splitlines()]
    first = load_rollouts(learned / "rollouts" / "step_000001.jsonl")[:16]
    assert gap(model, first) > 0.02, "trained weights give other log-probs than those that sampled in step 1"
    base = AutoModelForCausalLM.from_pretrained(base_of(learned)).eval()
    assert gap(base, first) < 1e-5
    right = sum("ok" in line["verdicts"] for line in kept) / len(kept)
    assert right > 0.5 and tokenizer.decode(kept[0]["responses"][0], skip_special_tokens=True).isalnum()


def base_of(run_dir: Path) -> str:
    import yaml

    return yaml.safe_load((run_dir / "config.yaml").read_text())["model"]["path"]


def gap(model: Any, rollouts: list[Any]) -> float:
    """Mean distance of the model's log-probs from the engine's."""
    gaps = []
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt.token_ids + rollout.response_ids])
        with torch.no_grad():
            logp_LV = model(ids).logits[0, len(rollout.prompt.token_ids) - 1 : -1].log_softmax(-1)
        logp_L = logp_LV.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        gaps.append((logp_L - torch.tensor(rollout.behaviour_logp)).abs())
    return float(torch.cat(gaps).mean())


def test_the_engine_serves_exactly_what_was_exported(learned: Path, server_url: str, tmp_path: Path) -> None:
    """The server has the last push of the last run on it: push the exported folder, compare its log-probs."""
    from transformers import AutoModelForCausalLM

    from owpo_megatron.config import EngineConfig, SyncConfig
    from owpo_megatron.engine import start_fleet
    from owpo_megatron.sync import make_sync
    from owpo_megatron.types import SampleRequest, Sampling

    model = AutoModelForCausalLM.from_pretrained(learned / "hf").eval()
    prompts = [rollout.prompt for rollout in load_rollouts(learned / "rollouts" / "step_000001.jsonl")[::8]]
    with start_fleet(EngineConfig(urls=[server_url]), learned / "hf", "float32", {}, tmp_path) as fleet:
        make_sync(SyncConfig(), fleet.clients, tmp_path).push(model.state_dict().items(), version=77)
        rollouts = fleet.generate([SampleRequest(prompt, 5) for prompt in prompts], Sampling(8))
    assert gap(model, rollouts) < 1e-5


def test_owpo_eval_of_the_run_beside_its_base(
    learned: Path, summary: dict[str, Any], base_model: Path, server_url: str, tmp_path: Path
) -> None:
    """One command, two rows: a model folder and a checkpoint, which is exported and loaded by the server. Killed in the
    middle and started again, the result is the same file."""

    def evaluate(out: Path, *targets: str) -> Owpo:
        sizes = ["--limit", "100", "--samples", "16", "--max-tokens", "8"]
        options = ["--set", "held=task:cipher", "--template", "raw", *sizes, "--out", str(out)]
        return Owpo(tmp_path, "eval", *targets, *options, f"engine.urls=['{server_url}']")

    base, straight, killed = str(base_model), tmp_path / "straight", tmp_path / "killed"
    evaluating = evaluate(straight, "--model", base, "--run", str(learned))
    said = evaluating.done(timeout=500)
    for line in ("loading the weights into the servers", "of 1600 samples"):  # progress in a file, too
        assert line in evaluating.stderr
    rows = {row["method"]: row["sets"]["held"] for row in json.loads((straight / "table.json").read_text())["scores"]}
    before, after = (rows[method]["metrics"]["pass@1"] for method in ("", "owpo (learned)"))
    assert "converged" in said and "Pass@1" in said and (straight / "scores.png").is_file()
    assert before["low"] < summary["pass_at_1_before"] + 0.05 and summary["pass_at_1_before"] - 0.05 < before["high"]
    assert after["low"] < summary["pass_at_1_after"] + 0.05 and summary["pass_at_1_after"] - 0.05 < after["high"]
    assert not list(straight.rglob("model.safetensors")), "the exported folder goes when it has been served"
    part = killed / base_model.name / "held.part.jsonl"
    owpo = evaluate(killed, "--model", base)
    owpo.wait_until(lambda: part.exists() and part.read_text().count("\n") > 100, "samples", timeout=300, every=0.01)
    owpo.kill()
    drawn = part.read_text().count("\n") - 1
    evaluate(killed, "--model", base).done(timeout=300)
    whole = json.loads((killed / base_model.name / "held.json").read_text())
    assert 0 < whole["last_call"]["samples"] <= 1600 - drawn + 1, "a line may have been cut by the kill, no more"
    kept = Path(base_model.name) / "held.jsonl"
    assert (killed / kept).read_bytes() == (straight / kept).read_bytes()


def test_resumed_with_a_real_engine(ranks: Ranks, small: dict[str, Any], server_url: str, tmp_path: Path) -> None:
    """Killed after two of four steps: the same prompts, seeds, reference and, with an engine whose samples depend on
    nothing but their seeds, the same tokens and the same lines."""
    runs = {}
    for name in ("real_straight", "real_killed"):
        sizes = {"optimizer": {"steps": 4}, "reference": {"every": 2}, "checkpoint": {"every": 1}, "name": name}
        config = write_config(tmp_path / f"{name}.yaml", small, sizes, {"engine": {"urls": [server_url]}})
        runs[name] = run_dir = Path(small["runs_dir"]) / name
        run = WarmRun(ranks, config)
        if name == "real_killed":
            run.wait_until(lambda run_dir=run_dir: newest_step(run_dir) >= 2, "step 2")
            run.kill()
            run = WarmRun(ranks, config)
        run.done()
        assert run.survivors() == []
    straight, killed = runs.values()
    for step in range(1, 5):
        ours, theirs = (load_rollouts(run / "rollouts" / f"step_{step:06d}.jsonl") for run in (killed, straight))
        assert [(r.prompt, r.seed, r.policy_version) for r in ours] == [
            (r.prompt, r.seed, r.policy_version) for r in theirs
        ]
        assert ours == theirs, f"tokens or log-probs of step {step} differ"
    assert steps_of(killed) == steps_of(straight)
    assert (killed / "hf" / "model.safetensors").read_bytes() == (straight / "hf" / "model.safetensors").read_bytes()


def test_an_engine_killed_in_the_middle_is_replaced_and_the_run_goes_on(
    small: dict[str, Any], engine_python: Path, tmp_path: Path
) -> None:
    """A server of the run's own: restarted once, its weights pushed again; nothing of it is left at the end."""
    sizes = {
        "optimizer": {"steps": 6},
        "name": "engine_killed",
        "engine": {"python": str(engine_python), "device": "cpu"},
    }
    owpo = Owpo(tmp_path, "train", "-c", str(write_config(tmp_path / "run.yaml", small, sizes)))
    run_dir = Path(small["runs_dir"]) / "engine_killed"
    owpo.wait_until(lambda: newest_step(run_dir) >= 2, "step 2", timeout=120)
    servers = [process for process in owpo.tree() if is_server(process)]
    assert servers
    os.kill(servers[0].pid, signal.SIGKILL)
    owpo.done(timeout=200)
    steps = steps_of(run_dir)
    assert values(steps, "step") == [1, 2, 3, 4, 5, 6]
    assert max(values(steps, "mismatch")) < 1e-4, "the new server sampled with other weights"
    assert values(steps, "policy_version") == [0, 1, 2, 3, 4, 5]
    launches = (run_dir / "logs" / "engine_0.log").read_text().count(" sglang.launch_server")
    assert launches == 2
    assert owpo.survivors() == []


def is_server(process: psutil.Process) -> bool:
    try:
        return "sglang.launch_server" in process.cmdline() and "supervise" not in " ".join(process.cmdline())
    except psutil.Error:
        return False


def test_metrics_are_the_same_line_by_line_from_recorded_rollouts(
    ranks: Ranks, learned: Path, small: dict[str, Any], tmp_path: Path
) -> None:
    """Purpose of `rollout.replay`: the run above again without an engine, three steps, every number the same."""
    layers = (small, SIZES, {"name": "replayed", "eval": {"before": False, "after": False}})
    config = write_config(
        tmp_path / "run.yaml", *layers, {"rollout": {"replay": str(learned / "rollouts")}, "optimizer": {"steps": 8}}
    )
    train(ranks, config)
    ours, theirs = steps_of(Path(small["runs_dir"]) / "replayed"), steps_of(learned)
    assert [without(line, "verifier") for line in ours] == [without(line, "verifier") for line in theirs]
