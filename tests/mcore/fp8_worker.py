"""Log-probs of each layout in exact and refined FP8, and an update between two FP8 passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

LAYOUTS: list[dict[str, Any]] = [{"tp": 2, "pp": 2}, {"tp": 2, "sp": True, "dp": 2}]


def gaps(model: Path, layout: dict[str, Any], vocab_size: int) -> tuple[Any, dict[str, Any]]:
    """(topology, modes and absolute differences between refined FP8 and exact, before and after an update)."""
    import torch
    from tiny import build_policy, make_config, random_samples

    from owpo_megatron.methods import make_method

    def policy_with(head: str, topology: Any = None) -> Any:
        config = make_config(model, parallel=layout, model={"path": str(model), "head": head})
        return build_policy(config, topology)

    exact = policy_with("exact")
    refined = policy_with("fp8_refined", exact.topology)
    samples = random_samples(0, count=40, vocab_size=vocab_size, logps=False)
    found: dict[str, Any] = {"gap": [], "norm_gap": [], "rows": sum(len(sample.response_ids) for sample in samples)}
    for _ in range(2):
        logps = {policy: policy.logprobs(samples) for policy in (exact, refined)}
        wanted, got = (torch.cat(logps[policy]) for policy in (exact, refined))
        found["gap"].append(float((got - wanted).abs().mean()))
        norms = []
        for policy, known in logps.items():
            mode = policy.logp_mode
            old = [
                replace(sample, old_logp=logp, ref_logp=logp, old_mode=mode, ref_mode=mode)
                for sample, logp in zip(samples, known, strict=True)
            ]
            norms.append(policy.update(old, make_method("owpo"))["grad_norm"])
        found["norm_gap"].append(abs(norms[1] / norms[0] - 1))
    return exact.topology, found | {"mode": refined.topology.all_gather(refined.logp_mode)}


def gaps_of_layouts(model: Path, vocab_size: int) -> list[dict[str, Any]]:
    return [{"layout": layout} | gaps(model, layout, vocab_size)[1] for layout in LAYOUTS]
