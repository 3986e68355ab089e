"""Truncated importance sampling through a real update: the engine's log-probs reach the objective, token by token."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import build_policy, make_config, make_hf_model, random_samples

from owpo_megatron.errors import RunError
from owpo_megatron.methods import make_method


def test_an_update_with_an_engine_that_disagrees(tmp_path: Path) -> None:
    """The engine gave the tokens of every other sample e^-0.1 of the trainer's probability, and a fifth of it to the
    others': factors of e^0.1, and of 5, which the cap cuts to 3. Every gradient grows."""
    config = make_config(make_hf_model(tmp_path / "model"))
    policy = build_policy(config)
    samples = [
        replace(one, behaviour_logp=tuple(logp - gap for logp in one.old_logp.tolist()))
        for one, gap in zip(random_samples(3), [0.1, math.log(5)] * 4, strict=True)
    ]
    lengths = [0 if one.masked else len(one.response_ids) for one in samples]
    small, large = sum(lengths[::2]), sum(lengths[1::2])
    found = policy.update(samples, make_method("owpo", tis_cap=3.0))
    assert found["tokens"] == small + large
    assert found["tis_sum"] == pytest.approx(small * math.exp(0.1) + large * 3.0, rel=1e-6)
    assert found["tis_capped"] == large
    agreeing = build_policy(config, policy.topology)
    plain = agreeing.update(samples, make_method("owpo"))
    assert "tis_sum" not in plain and plain["loss_count"] == found["loss_count"]
    assert found["grad_norm"] > 1.1 * plain["grad_norm"]
    assert found["head_gradient_rows"] == plain["head_gradient_rows"]


def test_an_update_that_diverged_says_so(tmp_path: Path) -> None:
    """Adam moves every weight by about the learning rate: after the first update nothing is finite any more."""
    config = make_config(make_hf_model(tmp_path / "model"), optimizer={"lr": 1e30, "warmup_steps": 0})
    policy = build_policy(config)
    with pytest.raises(RunError, match="norm is (nan|inf) at learning rate 1e"):
        for _ in range(3):
            policy.update(random_samples(3), make_method("owpo"))


def test_the_cause_of_a_bad_gradient_is_named_and_nothing_has_changed(tmp_path: Path) -> None:
    """Weights, data or learning rate; where the handler returns, weights, optimizer and learning rate are as before."""
    policy = build_policy(make_config(make_hf_model(tmp_path / "model"), optimizer={"warmup_steps": 0}))
    causes: list[str] = []
    policy.on_bad_gradient = causes.append
    policy.update(random_samples(1), make_method("owpo"))
    before = policy.weights_digest()
    bad = [replace(one, advantage=math.nan) if index == 1 else one for index, one in enumerate(random_samples(2))]
    found = policy.update(bad, make_method("owpo"))
    assert found["skipped"] == 1 and found["loss_count"] == 0 and policy.weights_digest() == before
    assert "because the advantage of a sample" in causes[-1]
    twin = build_policy(make_config(tmp_path / "model", optimizer={"warmup_steps": 0}), policy.topology)
    for one in (policy, twin):
        for seed in (1, 3) if one is twin else (3,):
            one.update(random_samples(seed), make_method("owpo"))
    assert policy.weights_digest() == twin.weights_digest(), "the skipped update left a trace"
    with torch.no_grad():
        next(policy._chunks[0].parameters()).fill_(math.inf)
    assert not policy.weights_are_finite() and twin.weights_are_finite()
    policy.update(random_samples(4), make_method("owpo"))
    assert "because weights of the policy are not finite" in causes[-1]


def test_a_minibatch_in_which_no_sample_counts_moves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Adam's momentum of the update before would move the weights without any evidence."""
    policy = build_policy(make_config(make_hf_model(tmp_path / "model"), optimizer={"warmup_steps": 0}))
    policy.update(random_samples(1), make_method("grpo"))
    before = {name: value.clone() for name, value in policy.named_weights()}
    found = policy.update([replace(one, masked=True) for one in random_samples(2)], make_method("grpo"))
    assert found["loss_count"] == 0 and found["grad_norm"] == 0 and "no sample of this minibatch counts" in caplog.text
    assert all(value.equal(before[name]) for name, value in policy.named_weights())
    policy.update(random_samples(3), make_method("grpo"))
    assert not all(value.equal(before[name]) for name, value in policy.named_weights())
