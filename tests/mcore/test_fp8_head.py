"""`model.head: fp8_refined` through the megatron model: the guard, the mode that travels, tensor and pipeline ranks.

Not covered: FP8 arithmetic of a GPU. On a CPU operands are rounded as FP8 rounds them and multiplied in float32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fp8_worker import LAYOUTS, gaps, gaps_of_layouts
from rank_pool import Ranks
from tiny import build_policy, make_config, make_hf_model, random_samples

from owpo_megatron.head.fp8_check import MAX_MEAN, MAX_NORM_GAP
from owpo_megatron.methods import make_method


def test_refined_log_probs_are_close_and_say_what_they_are(tmp_path: Path) -> None:
    """Also after an update: a pass quantises the weight as it is then."""
    _, found = gaps(make_hf_model(tmp_path / "model", vocab_size=40), {}, 40)
    assert found["mode"] == ["fp8_refined"]
    assert all(0 < gap < MAX_MEAN for gap in found["gap"]), found
    assert all(0 < gap < MAX_NORM_GAP for gap in found["norm_gap"]), found


def test_on_four_ranks(ranks: Ranks, tmp_path: Path) -> None:
    results = ranks.run(4, gaps_of_layouts, make_hf_model(tmp_path / "m", vocab_size=72), 72)[0]
    assert [result["layout"] for result in results] == LAYOUTS
    for result in results:
        assert result["mode"] == ["fp8_refined"] * 4
        assert all(0 < gap < MAX_MEAN for gap in result["gap"]), result
        assert all(0 < gap < MAX_NORM_GAP for gap in result["norm_gap"]), result


def test_a_model_that_fp8_does_not_fit_is_computed_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A flat distribution over 2,000 columns: the tail that stays in FP8 decides."""
    model = make_hf_model(tmp_path / "model", vocab_size=2000)
    samples = random_samples(0, count=30, vocab_size=2000, logps=False)
    refined = build_policy(make_config(model, model={"path": str(model), "head": "fp8_refined"}))
    assert refined.logp_mode == "fp8_refined"
    found = refined.logprobs(samples)
    assert refined.logp_mode == "exact" and caplog.text.count("NOT used") == 1
    exact = build_policy(make_config(model), refined.topology).logprobs(samples)
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_raw_fp8_is_refused_in_an_update(tmp_path: Path) -> None:
    policy = build_policy(make_config(make_hf_model(tmp_path / "model")))
    samples = [replace(sample, old_mode="fp8_raw") for sample in random_samples(0)]
    with pytest.raises(TypeError, match="old log-probs are fp8_raw"):
        policy.update(samples, make_method("owpo"))
