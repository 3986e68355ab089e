"""One update of OPD over the whole vocabulary, by a teacher in a slot of its own or in the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def learn_whole(model: Path, teacher: Path, oracle_file: Path, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each case {"parallel": {...}, "slot": "teacher" or "reference", "placement": ...} what moved how."""
    import torch
    from teacher_worker import largest, teacher_samples
    from tiny import build_policy, make_config

    from owpo_megatron.mcore.topology import init_topology
    from owpo_megatron.methods import make_method
    from owpo_megatron.policy import SlotTeacher

    oracle, results = torch.load(oracle_file), []
    for case in cases:
        reference = {"path": str(teacher)} if case["slot"] == "reference" else {}
        config = make_config(
            model, parallel=case["parallel"], reference={"placement": case["placement"], **reference},
            optimizer={"tokens_per_microbatch": 40},
        )  # fmt: skip
        policy = build_policy(config, init_topology(config.parallel, config.seed))
        if case["slot"] == "teacher":
            SlotTeacher(policy, "teacher", teacher, case["placement"] == "resident")
        sums = policy.update(teacher_samples(), make_method("opd", vocabulary="full"))
        weights = dict(policy.named_weights())
        results.append(
            {
                "kl": sums["kl_whole_sum"],
                "loss": sums["loss_sum"] / sums["loss_count"],
                "grad_norm": sums["grad_norm"],
                "weights": largest(weights.values(), [oracle[n] for n in weights]) if weights else None,
            }
        )
    return results
