"""One update of every method on this rank's part of a minibatch, as a run makes it; run by test_method_updates.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

KEPT = ("loss_sum", "loss_count", "grad_norm", "tokens", "ratio_sum", "clip_count", "ref_tokens", "w_sum", "kept_sum")


def methods() -> list[Any]:
    """Every objective of the catalogue, a coupled one for each coupling, an entropy bonus with one of each divisor."""
    from coupled_methods import COUPLED, distinct_objectives

    every = [*distinct_objectives(), *COUPLED]
    return [*every, *(replace(one, entropy_coef=0.1) for one in every if one.name in ("dapo", "grpo"))]


def minibatch() -> list[Any]:
    """Five samples of 3 to 14 tokens in two groups, one masked: with dp 2 and 13 tokens per microbatch the ranks fill
    two and one."""
    from tiny import random_samples

    lengths = (8, 6, 4, 2, 3)
    samples = random_samples(11, count=40)
    found = []
    for index, length in enumerate(lengths):
        source = next(one for one in samples if len(one.response_ids) >= length)
        samples.remove(source)
        found.append(
            replace(
                source,
                prompt_ids=source.prompt_ids[:1] * (1 + index % 3),
                response_ids=source.response_ids[:length],
                behaviour_logp=source.behaviour_logp[:length],
                old_logp=source.old_logp[:length],
                ref_logp=source.ref_logp[:length],
                active=index != 2,
                masked=index == 3,
                group=index // 3,
                reward=float(index in (0, 4)),
                old_statistic=source.old_logp[:length] + 0.5,  # of an imagined policy
                advantage=(1.0, -0.8, 0.6, 0.3, -1.2)[index],
            )
        )
    return found


def plan_of(samples: list[Any], dp: int, tokens: int) -> list[list[list[int]]]:
    from owpo_megatron.mcore.packing import packed_length, plan_microbatches

    return plan_microbatches([packed_length(sample) for sample in samples], dp, tokens)


def updates(
    model: Path,
    parallel: dict[str, Any],
    tokens: int,
    passes: int = 1,
    offload: bool = False,
    names: Any = None,
    moments: str = "float32",
) -> list[dict[str, Any]]:
    """Return each method's metrics, and the sum of squares and first values of every parameter afterwards.

    Args:
        passes: updates by each method.
        names: the methods; None: all.
    """
    import torch
    from tiny import build_policy, make_config

    from owpo_megatron.mcore.topology import init_topology
    from owpo_megatron.methods.prepare import prepared_in_minibatch

    optimizer = {"tokens_per_microbatch": tokens, "warmup_steps": 0, "offload": offload, "moments": moments}
    config = make_config(model, parallel=parallel, optimizer=optimizer)
    topology = init_topology(config.parallel, config.seed)
    policy, found = build_policy(config, topology), []
    for method in (one for one in methods() if names is None or one.name in names):
        policy.load_weights(model)
        policy._optimizer.reload_model_params()
        policy.restart_optimizer()
        samples = minibatch()
        if method.coupling in ("group", "minibatch"):
            if method.statistic is None:
                found_in_pass = policy.logprobs_and_entropies(samples)
            else:
                found_in_pass = policy.logprobs_and_statistics(samples, method.statistic)
            samples = prepared_in_minibatch(method, samples, *found_in_pass[:2], policy.logp_mode, *found_in_pass[2:])
        for _ in range(passes):
            sums = policy.update(samples, method)
        weights = dict(policy.named_weights())
        found.append(
            {
                "method": method.name,
                "sums": {name: sums[name] for name in KEPT if name in sums},
                "weights": {name: value.double().flatten()[:50].tolist() for name, value in weights.items()},
                "squares": float(torch.tensor([value.double().square().sum() for value in weights.values()]).sum()),
            }
        )
    return found
