"""Trains three updates of each requested case and finds how far it is from the dense oracle's file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

UPDATES = 3


def with_experts(samples: list[Any], experts: int = 4, chosen: int = 2, layers: int = 4) -> list[Any]:
    """The samples with random experts for each token that a model reads, other than a router's own."""
    import random
    from dataclasses import replace

    import numpy

    from owpo_megatron.types import RoutedExperts

    found = []
    for number, sample in enumerate(samples):
        draw = random.Random(number)
        tokens = len(sample.prompt_ids) + len(sample.response_ids) - 1
        told = [[draw.sample(range(experts), chosen) for _ in range(layers)] for _ in range(tokens)]
        found.append(replace(sample, experts=RoutedExperts.of(numpy.array(told), experts)))
    return found


def batches() -> list[list[Any]]:
    """Minibatches of 8 samples and, last, of a single one: with dp = 2 a rank has nothing to do."""
    from tiny import random_samples

    return [random_samples(0), random_samples(1), random_samples(7, count=1)]


def distance(model: Path, oracle: dict[str, Any], layout: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(topology, largest absolute differences from the oracle; of grad_norm: relative). Weights on rank 0 only.

    The layout may also have `tokens_per_microbatch`, and `replay`: the samples come with experts.
    """
    from tiny import build_policy, make_config, random_samples

    from owpo_megatron.methods import make_method

    parallel = {name: value for name, value in layout.items() if name not in ("tokens_per_microbatch", "replay")}
    dressed = with_experts if layout.get("replay") else list
    tokens = layout.get("tokens_per_microbatch", 24)
    policy = build_policy(make_config(model, parallel=parallel, optimizer={"tokens_per_microbatch": tokens}))
    logp = policy.logprobs(dressed(random_samples(0, logps=False)))
    losses, norms = [], []
    for samples in batches():
        sums = policy.update(dressed(samples), make_method("owpo"))
        losses.append(sums["loss_sum"] / sums["loss_count"])
        norms.append(sums["grad_norm"])
    weights = dict(policy.named_weights())
    found = {
        "logp": max(float((a - b).abs().max()) for a, b in zip(logp, oracle["logp"], strict=True)),
        "loss": max(abs(a - b) for a, b in zip(losses, oracle["losses"], strict=True)),
        "grad_norm": max(abs(a / b - 1) for a, b in zip(norms, oracle["grad_norms"], strict=True)),
    }
    if policy.topology.is_main:
        found["names"] = sorted(weights) == sorted(oracle["names"])
        found["weights"] = max(float((weights[name] - oracle["weights"][name]).abs().max()) for name in weights)
        found["moved"] = max(float((weights[name] - oracle["start"][name]).abs().max()) for name in weights)
    return policy.topology, found


def distances(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare cases {"model": folder, "oracle": file, "layouts": [{"tp": 2}, ...]}, one after the other."""
    import torch

    found = []
    for case in cases:
        oracle = torch.load(case["oracle"])
        for layout in case["layouts"]:
            found.append({"layout": layout} | distance(Path(case["model"]), oracle, layout)[1])
    return found
