"""`optimizer.moments: bfloat16`: float32 steps whose moments are rounded in between, and their memory.

The oracle is a policy with float32 moments that are rounded by hand after each update. Every method, ranks, experts,
offload: test_method_updates.py; resumed runs: test_checkpoint.py. Not covered: CUDA, Transformer Engine's FusedAdam.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import build_policy, make_config, make_hf_model, random_samples

from owpo_megatron.mcore.optimizer import distributed_optimizers
from owpo_megatron.methods import make_method


def moments_of(policy: Any) -> list[torch.Tensor]:
    states = [state for one in distributed_optimizers(policy._optimizer) for state in one.optimizer.state.values()]
    return [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equals_moments_rounded_by_hand(dtype: str, tmp_path: Path) -> None:
    model = make_hf_model(tmp_path / "model", num_hidden_layers=2)
    ends = {}
    for name in ("rounded", "by hand", "float32"):
        optimizer = {"lr": 1e-3, "warmup_steps": 0, "moments": "bfloat16" if name == "rounded" else "float32"}
        policy = build_policy(make_config(model, model={"dtype": dtype}, optimizer=optimizer))
        for seed in range(4):
            policy.update(random_samples(seed, logps=False), make_method("grpo"))
            if name == "by hand":
                for moment in moments_of(policy):
                    moment.copy_(moment.bfloat16())
        ends[name] = policy.weights_digest()
    assert ends["rounded"] == ends["by hand"] != ends["float32"]


@pytest.mark.parametrize("offload", [False, True])
def test_memory_between_steps(offload: bool, tmp_path: Path) -> None:
    """Two bytes per value, of small parameters too; in turn with engines all of it is on the host."""
    config = make_config(make_hf_model(tmp_path / "model"), optimizer={"moments": "bfloat16", "offload": offload})
    policy = build_policy(config)
    elements = sum(moment.numel() for moment in moments_of(policy))
    assert elements == 2 * sum(param.numel() for param in policy._chunks[0].parameters())

    def check(away: bool) -> None:
        state = policy._memory.state
        assert all(moment.untyped_storage().nbytes() == 0 for moment in moments_of(policy))
        assert (state.bytes_rounded, state.bytes_away) == ((0, 2 * elements) if away else (2 * elements, 0))

    check(away=offload)
    for seed in range(2):
        policy.update(random_samples(seed, logps=False), make_method("grpo"))
        check(away=offload)
        policy.rest()
        check(away=True)
    policy.update(random_samples(2, logps=False), make_method("grpo"))
    check(away=offload)
