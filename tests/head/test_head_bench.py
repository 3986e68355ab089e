"""Instruments of `owpo bench head`: errors against float64, peak memory, densities. Not covered: its figures."""

from __future__ import annotations

import pytest
import torch

from owpo_megatron.bench.head import ExactGradients, HeadProblem, dense, ours
from owpo_megatron.bench.peak_memory import PeakMemory
from owpo_megatron.methods import make_method


def test_errors_are_those_of_float32() -> None:
    problem, objective = HeadProblem.random(300, 16, 500), make_method("owpo")
    exact = ExactGradients(problem)
    for density in (1.0, 0.4):
        given = problem.at_density(density)
        assert int((given.batch.advantage_T != 0).sum()) == round(300 * density)
        results = {"ours": ours(given, objective), "dense": dense(given, objective)}
        for name, found in results.items():
            assert 0 < exact.error(given, objective, found) < 1e-4, name
        loss, dh, dweight = results["ours"]
        assert exact.error(given, objective, (loss, 1.01 * dh, dweight)) > 1e-3
        assert exact.error(given, objective, (loss, dh, 1.01 * dweight)) > 1e-3


def test_peak_memory_sees_what_is_freed_again() -> None:
    with PeakMemory(torch.device("cpu")) as memory:
        torch.ones(16 << 20).sum()
    if memory.extra_bytes is None:
        pytest.skip("this system does not report the peak of resident memory")
    assert 60 << 20 < memory.extra_bytes < 100 << 20
    with PeakMemory(torch.device("cpu")) as nothing:
        pass
    assert nothing.extra_bytes is not None and nothing.extra_bytes < 8 << 20


@pytest.mark.slow
def test_less_memory_than_dense() -> None:
    """The purpose of the head, at a sufficient size: logits of 128 MB, of which ours holds a quarter at a time."""
    problem, objective = HeadProblem.random(2048, 32, 16384), make_method("owpo")
    peaks = []
    for run in (ours, dense):
        run(problem, objective)
        with PeakMemory(torch.device("cpu")) as memory:
            run(problem, objective)
        if memory.extra_bytes is None:
            pytest.skip("this system does not report the peak of resident memory")
        peaks.append(memory.extra_bytes)
    assert peaks[0] < 0.35 * peaks[1], peaks


@pytest.mark.slow
def test_megatron_takes_part() -> None:
    """The adapter to megatron's own cross-entropy, which the GPU benchmark compares with."""
    from owpo_megatron.bench.head import dense_logp
    from owpo_megatron.bench.head_peers import megatron
    from owpo_megatron.mcore.cross_entropy import one_rank_cross_entropy

    problem = HeadProblem.random(20, 8, 50)
    logp_T = megatron(one_rank_cross_entropy()).load()(problem.h_TH, problem.weight_VH, problem.target_T)
    torch.testing.assert_close(logp_T, dense_logp(problem.h_TH, problem.weight_VH, problem.target_T))


def test_the_plot_leaves_out_what_failed(tmp_path) -> None:
    from owpo_megatron.report.head_plot import write_head_plot

    shape = {"tokens": 8, "hidden": 4, "vocab": 10, "work": "log-probs", "density": 1.0}
    rows = [{"impl": "ours", "ms": 2.0, "extra_peak_bytes": 10, **shape}, {"impl": "peer", "error": "absent", **shape}]
    write_head_plot(rows, tmp_path / "head.png")
    assert (tmp_path / "head.png").read_bytes().startswith(b"\x89PNG")
