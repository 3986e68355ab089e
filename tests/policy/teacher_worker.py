"""Teachers as further slots on two ranks, and an update that learns from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

DOMAINS = ("maths", "code", "poems")  # of samples 0, 1, 2, 0, ...; maths has a teacher of its own


def teacher_samples() -> list[Any]:
    """Samples of three domains with non-uniform advantages, old log-probs given."""
    from tiny import random_samples

    samples = [replace(sample, ref_logp=None) for sample in random_samples(3)]
    return [replace(sample, domain=DOMAINS[index % 3]) for index, sample in enumerate(samples)]


def routing() -> Any:
    from owpo_megatron.config.reference import TeacherConfig
    from owpo_megatron.trainer.teachers import Routing

    first = TeacherConfig(name="first", domains=["maths"], path=Path("x"))
    return Routing([first, TeacherConfig(name="second", path=Path("x"))])


def largest(ours: Any, theirs: Any) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def learn(
    model: Path, folders: dict[str, Path], oracle_file: Path, cases: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the results of each case {"parallel": {...}, "dtype": ..., "placement": ...}.

    The oracle's file has each teacher's log-probs of `teacher_samples` and MOPD's update by them, of transformers.
    """
    import torch
    from tiny import build_policy, make_config, random_samples

    from owpo_megatron.mcore.topology import init_topology
    from owpo_megatron.methods import make_method
    from owpo_megatron.policy import SlotTeacher
    from owpo_megatron.trainer.teachers import Teachers

    oracle, results = torch.load(oracle_file), []
    samples, probe = teacher_samples(), random_samples(50, logps=False)
    for case in cases:
        config = make_config(model, parallel=case["parallel"], model={"dtype": case["dtype"]})
        topology = init_topology(config.parallel, config.seed)
        policy = build_policy(config, topology)
        before = [param.detach().clone() for chunk in policy._chunks for param in chunk.parameters()]
        resident = case["placement"] == "resident"
        slots = {name: SlotTeacher(policy, name, folder, resident) for name, folder in folders.items()}
        untouched = all(
            torch.equal(a, b)
            for a, b in zip(before, (p for chunk in policy._chunks for p in chunk.parameters()), strict=True)
        )
        teachers = Teachers(routing(), slots)
        of_each = {name: largest(slots[name].logprobs(samples), oracle["logp"][name]) for name in slots}
        logps = teachers.logprobs(samples)
        routed = largest(logps, oracle["routed"])
        annotated = [replace(s, ref_logp=v, ref_mode=teachers.logp_mode) for s, v in zip(samples, logps, strict=True)]
        sums = policy.update(annotated, make_method("mopd", alpha=0.5))
        again = teachers.logprobs(samples)
        weights = dict(policy.named_weights())
        identities = {name: teacher.identity() for name, teacher in slots.items()}
        found = {
            "policy untouched by its teachers": untouched,
            "teachers untouched by the update": all(torch.equal(a, b) for a, b in zip(logps, again, strict=True)),
            "policy has moved": largest(policy.logprobs(probe), oracle["probe"]) > 1e-4,
            "same identity everywhere": len({json.dumps(i) for i in topology.all_gather(identities)}) == 1,
        }
        everywhere = topology.all_gather(found)
        results.append(
            {
                "case": case,
                "held": {name: all(rank[name] for rank in everywhere) for name in found},
                "of_each": of_each,
                "routed": routed,
                "mode": teachers.logp_mode,
                "identities": identities,
                "grad_norm": sums["grad_norm"],
                "metric": sums["kl_ref_sum"] / sums["ref_tokens"],
                "weights": largest(weights.values(), [oracle["weights"][n] for n in weights]) if weights else None,
            }
        )
    return results
