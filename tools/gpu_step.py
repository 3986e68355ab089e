"""The stage of tools/gpu_check.sh that trains: updates, swaps and checkpoints, bit for bit, then whole runs."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_rows import OWPO, ROOT, Check, Row, has, needs


def step(check: Check) -> None:
    """Half a billion parameters in megatron's own layers, no engine: random samples, then recorded responses."""
    needs("megatron")
    needs("megatron.core")
    from tiny import make_hf_model

    fields: dict[str, Any] = dict(vocab_size=96)
    if check.real:
        fields = dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, tied=True)
        fields |= dict(num_attention_heads=14)
    with tempfile.TemporaryDirectory() as folder:
        model = make_hf_model(Path(folder) / "model", "qwen2", **fields)
        for placement in ("resident", "offloaded"):
            _updates(check, model, placement)
        if check.real:
            check.row("peak memory", bytes=torch.cuda.max_memory_allocated())
            torch.cuda.empty_cache()
        _runs(check, model, Path(folder))


def _updates(check: Check, model: Path, placement: str) -> None:
    """Updates of OWPO on random samples, with the reference on the device or in host memory."""
    from tiny import build_policy, make_config, random_samples

    from owpo_megatron.methods import make_method
    from owpo_megatron.policy import SlotReference

    def row(what: str, passed: bool = True, **values: Any) -> None:
        check.row(what, passed, reference=placement, **values)

    began = time.perf_counter()
    dtype = "bfloat16" if check.real else "float32"
    sections = dict(model={"dtype": dtype}, optimizer={"tokens_per_microbatch": 64})
    policy = build_policy(make_config(model, **sections, reference={"placement": placement}))
    row("model built", seconds=time.perf_counter() - began, kernels=policy.fused_kernels or "none on a CPU")
    method, reference = make_method("owpo"), SlotReference(policy)
    samples = random_samples(0, count=32, vocab_size=96, logps=False)
    logps = policy.logprobs(samples)
    row("log-probs twice, same bits", _same(logps, policy.logprobs(samples)))
    row("the reference is the policy at first, same bits", _same(logps, reference.logprobs(samples)))

    def update(number: int) -> Row:
        given = random_samples(number, count=32, vocab_size=96)
        old, ref = policy.logprobs(given), reference.logprobs(given)
        found: Row = policy.update(
            [replace(s, old_logp=o, ref_logp=r) for s, o, r in zip(given, old, ref, strict=True)], method
        )
        return found

    began = time.perf_counter()
    sums = update(1)
    row("update", sums["grad_norm"] > 0, grad_norm=sums["grad_norm"], seconds=time.perf_counter() - began)
    moved = policy.logprobs(samples)
    stayed = _same(logps, reference.logprobs(samples))
    row("the policy moved, the reference did not", not _same(logps, moved) and stayed)
    reference.swap(1, "interval")
    row("after a swap the reference is the policy", _same(moved, reference.logprobs(samples)))
    update(2)
    row("and stays while the policy goes on", _same(moved, reference.logprobs(samples)))
    kept = policy.logprobs(samples)
    with tempfile.TemporaryDirectory() as state:
        policy.save(Path(state))
        update(3)
        policy.restore(Path(state), reference_is_policy=False)
    same = _same(kept, policy.logprobs(samples)) and _same(moved, reference.logprobs(samples))
    row("a restored state gives the same bits", same)


def _runs(check: Check, model: Path, folder: Path) -> None:
    """`owpo train` on recorded responses: two steps, and a third from the checkpoint of the second."""
    if missing := [name for name in ("typer", "httpx", "math_verify") if not has(name)]:
        check.row("owpo train on recorded responses: not run", reason=f"not installed: {', '.join(missing)}")
        return
    from fakes import record_rollouts

    from owpo_megatron.config import Config
    from owpo_megatron.data.small_tokenizers import make_character_tokenizer
    from owpo_megatron.data.tasks import get_task

    make_character_tokenizer(get_task("cipher").alphabet).save_pretrained(model)
    records, steps = folder / "records", (2, 3)
    raw: dict[str, Any] = {
        "name": "recorded", "runs_dir": str(folder / "runs"),
        "model": {"path": str(model), "dtype": "bfloat16" if check.real else "float32"},
        "data": {"source": "task:cipher", "max_prompt_tokens": 16},
        "rollout": {"prompts_per_step": 8, "group_size": 4, "max_response_tokens": 8},
        "optimizer": {"steps": max(steps), "updates_per_step": 2, "tokens_per_microbatch": 128},
        "reference": {"every": 2}, "checkpoint": {"every": 2}, "eval": {"before": False, "after": False},
    }  # fmt: skip
    record_rollouts(Config.build(raw), records, steps=max(steps))
    file = folder / "run.json"
    file.write_text(json.dumps(raw | {"rollout": {**raw["rollout"], "replay": str(records)}}))
    for wanted in steps:
        began = time.perf_counter()
        done = subprocess.run([*OWPO, "train", "-c", str(file), f"optimizer.steps={wanted}"], cwd=ROOT)
        metrics = folder / "runs" / "recorded" / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        taken = [line for line in lines if "grad_norm" in line]
        last = taken[-1] if taken else {}
        check.row(
            f"owpo train on recorded responses, {wanted} steps", done.returncode == 0 and len(taken) == wanted,
            seconds=time.perf_counter() - began, **{name: last.get(name) for name in ("loss", "grad_norm", "ref_id")},
        )  # fmt: skip


def _same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
