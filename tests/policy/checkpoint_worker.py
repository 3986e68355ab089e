"""Saves runs in the middle, or goes on from what another process saved, and compares every bit.

A case is {"parallel": {...}, "dtype": ..., "aliased": bool, "loaded": bool}
    aliased: the reference is the policy at the save
    loaded: the run began with OTHER_MODEL as its reference
    moments: between steps; float32 where it is absent
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from owpo_megatron.run.sealed import sha256_of

SAVED_AFTER, MORE = 3, 2  # updates


def start(case: dict[str, Any], model: Path, other: Path) -> tuple[Any, Any]:
    """(policy, reference) of a case at its beginning."""
    from tiny import build_policy, make_config

    from owpo_megatron.policy import SlotReference

    sections: dict[str, Any] = {
        "parallel": case["parallel"],
        "model": {"dtype": case["dtype"]},
        "reference": {"path": str(other) if case["loaded"] else None},
        "optimizer": {"warmup_steps": 4, "tokens_per_microbatch": 48, "moments": case.get("moments", "float32")},
    }
    policy = build_policy(make_config(model, **sections))
    return policy, SlotReference(policy, loaded=case["loaded"])


def update(policy: Any, reference: Any, number: int) -> dict[str, Any]:
    """One OWPO update whose reference log-probs come from the reference."""
    from tiny import random_samples

    from owpo_megatron.methods import make_method

    samples = random_samples(number)
    logps = reference.logprobs(samples)
    annotated = [replace(sample, ref_logp=logp) for sample, logp in zip(samples, logps, strict=True)]
    return policy.update(annotated, make_method("owpo"))


def snapshot(policy: Any, reference: Any) -> dict[str, Any]:
    """Everything that a resumed run must have, of this rank."""
    from tiny import random_samples

    from owpo_megatron.mcore.optimizer import distributed_optimizers

    probe = random_samples(50, logps=False)
    with policy._memory.with_state():
        adam = [
            (state["step"].clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone(), param.detach().clone())
            for one in distributed_optimizers(policy._optimizer)
            for param, state in one.optimizer.state.items()
        ]
    return {
        "parameters": [param.detach().clone() for chunk in policy._chunks for param in chunk.parameters()],
        "optimizer": adam,
        "lr": [group["lr"] for group in policy._optimizer.param_groups],
        "updates": policy._scheduler.num_steps,
        "log-probs": policy.logprobs(probe),
        "reference log-probs": reference.logprobs(probe),
        "reference": reference.state_dict(),
        "weights": [(name, tensor.clone()) for name, tensor in policy.named_weights()],
    }


def equal(ours: Any, theirs: Any) -> bool:
    """Bit for bit, through lists, tuples and dicts."""
    import torch

    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(equal(a, b) for a, b in zip(ours, theirs, strict=True))
    return bool(ours == theirs)


def save(policy: Any, reference: Any, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    import torch

    topology = policy.topology
    for number in range(1, SAVED_AFTER + 1):
        update(policy, reference, number)
        if number == (SAVED_AFTER if case["aliased"] else 1):
            reference.swap(number, "interval")
    beside = folder / "written beside training"
    if topology.is_main:
        (folder / "state").mkdir(parents=True)
        beside.mkdir()
    topology.barrier()
    begin = time.perf_counter()
    policy.save(folder / "state")
    seconds = time.perf_counter() - begin
    helpers = multiprocessing.active_children()
    expected = {"saved": snapshot(policy, reference)}
    writing = begin_stopped(policy, beside)
    expected["sums"] = [update(policy, reference, SAVED_AFTER + more) for more in range(1, MORE + 1)]
    writer = writing._process  # None: this rank has nothing to write
    before = writing.ready() and writer is not None
    while not writing.ready(0.1):
        os.kill(writer.pid, signal.SIGCONT)
    hashes = writing.finish()
    torch.save(expected | {"end": snapshot(policy, reference)}, folder / f"rank_{topology.rank}.pt")
    return {
        "aliased": expected["saved"]["reference"]["is_policy"] == case["aliased"],
        "seconds": seconds,
        "no helper is left behind": not helpers + multiprocessing.active_children(),
        "not ready before it is written": not before,
        "the same files beside training": files_of(beside) == files_of(folder / "state"),
        "hashes of all ranks' shards": hashes == {file.name: sha256_of(file) for file in beside.glob("*.distcp")},
    }


def begin_stopped(policy: Any, state: Path) -> Any:
    """Begin a save whose writer stops before it writes."""
    from owpo_megatron.mcore import state_writer

    write = state_writer._written

    def stopped(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)
        return write(*arguments)

    state_writer._written = stopped
    try:
        return policy.begin_save(state)
    finally:
        state_writer._written = write


def files_of(state: Path) -> dict[str, Any]:
    """Every shard's bytes, and the values next to the shards."""
    import torch

    shards: dict[str, Any] = {file.name: file.read_bytes() for file in state.glob("*.distcp")}
    names = sorted(file.name for file in state.iterdir())
    return shards | {"common": str(torch.load(state / "common.pt", weights_only=False)), "names": names}


def load(policy: Any, reference: Any, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    import torch

    expected = torch.load(folder / f"rank_{policy.topology.rank}.pt")
    begin = time.perf_counter()
    policy.restore(folder / "state", case["aliased"])
    seconds = time.perf_counter() - begin
    reference.load_state_dict(expected["saved"]["reference"])
    found = snapshot(policy, reference)
    held = {f"saved {name}": equal(found[name], value) for name, value in expected["saved"].items()}
    steps = [state[0] for state in found["optimizer"]]
    held["Adam's count"] = all(float(step) == SAVED_AFTER for step in steps)
    sums = [update(policy, reference, SAVED_AFTER + more) for more in range(1, MORE + 1)]
    held["sums of later updates"] = equal(sums, expected["sums"])
    found = snapshot(policy, reference)
    return (
        held
        | {f"final {name}": equal(found[name], value) for name, value in expected["end"].items()}
        | {"seconds": seconds}
    )


def run_cases(
    mode: Literal["save", "load"], model: Path, other: Path, root: Path, cases: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the checks that held on every rank, by case; a case's checkpoint is root / index."""
    found = []
    for index, case in enumerate(cases):
        policy, reference = start(case, model, other)
        folder = root / str(index)
        held = (save if mode == "save" else load)(policy, reference, case, folder)
        everywhere = policy.topology.all_gather(held)
        seconds = max(rank.pop("seconds") for rank in everywhere)
        held = {name: all(rank[name] for rank in everywhere) for name in everywhere[0]}
        found.append({"case": case, "seconds": seconds, "held": held})
    return found
