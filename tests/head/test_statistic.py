"""A method's own statistic of the vocabulary: through the head in any chunks, on any ranks, against dense float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from head_oracle import dense_statistic, make_head, make_inputs
from rank_pool import Ranks

from owpo_megatron.methods.statistic import MeanLogProb, MinPLogProb, Statistic

STATISTICS: list[Statistic] = [MeanLogProb(), MinPLogProb(0.02), MinPLogProb(0.3), MinPLogProb(0.0)]
TEMPERATURE = 0.7


def densely(statistic: Statistic, vocab_size: int) -> torch.Tensor:
    h_TH, weight_VH, target_T = inputs(vocab_size)
    rows = torch.log_softmax(h_TH @ weight_VH[:vocab_size].t() / TEMPERATURE, dim=1)
    found = dense_statistic(statistic, rows, rows.gather(1, target_T[:, None])[:, 0])
    assert found is not None
    return found


def inputs(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h_TH, weight_VH, target_T = make_inputs(rows=23, vocab=40)
    return h_TH, weight_VH, target_T % vocab_size


@pytest.mark.parametrize("statistic", STATISTICS, ids=str)
@pytest.mark.parametrize("chunk_rows", [1, 4, None])
def test_the_head_equals_dense(statistic: Statistic, chunk_rows: int | None) -> None:
    """Padding, a temperature, and rows that are left out; log-probs and entropies keep their bits."""
    h_TH, weight_VH, target_T = inputs(37)
    head = make_head(weight_VH, 37, temperature=TEMPERATURE, chunk_rows=chunk_rows)
    mask_T = torch.arange(23) % 3 != 0
    found = head.logprobs(h_TH, target_T, mask_T, statistic=statistic)
    assert found.statistic_T is not None
    torch.testing.assert_close(found.statistic_T[mask_T], densely(statistic, 37)[mask_T], rtol=1e-12, atol=1e-12)
    assert not found.statistic_T[~mask_T].any()
    plain = head.logprobs(h_TH, target_T, mask_T)
    assert torch.equal(plain.logp_T, found.logp_T) and torch.equal(plain.entropy_T, found.entropy_T)
    assert plain.statistic_T is None


def test_min_p_by_hand() -> None:
    """p = (.5, .3, .19, .01), kappa .05: .01 is below .025 and leaves, the others are divided by .99."""
    logp_TV = torch.tensor([[0.5, 0.3, 0.19, 0.01]], dtype=torch.float64).log().expand(4, 4)
    found = dense_statistic(MinPLogProb(0.05), logp_TV, logp_TV[0])
    assert found is not None
    assert found[:3].exp().tolist() == pytest.approx([0.5 / 0.99, 0.3 / 0.99, 0.19 / 0.99])
    assert found[3] == -math.inf
    assert dense_statistic(MinPLogProb(0.0), logp_TV, logp_TV[0]).tolist() == pytest.approx(logp_TV[0].tolist())
    assert dense_statistic(MeanLogProb(), logp_TV, logp_TV[0])[0] == pytest.approx(
        math.log(0.5 * 0.3 * 0.19 * 0.01) / 4
    )


def run_rank(folder: str) -> None:
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for vocab_size in (37, 15):
        h_TH, weight_VH, target_T = inputs(vocab_size)
        shard = (weight_VH.chunk(2)[rank], vocab_size, dist.group.WORLD)
        head = make_head(*shard, temperature=TEMPERATURE, chunk_rows=10)
        found[vocab_size] = [head.logprobs(h_TH, target_T, statistic=one).statistic_T for one in STATISTICS]
    torch.save(found, f"{folder}/rank{rank}.pt")


@pytest.mark.ranks
def test_two_ranks_equal_dense(ranks: Ranks, tmp_path: Path) -> None:
    """The largest log-prob may be another rank's; with 15 columns of 40 the second rank has padding alone."""
    ranks.run(2, run_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    for vocab_size, values in first.items():
        for statistic, ours, theirs in zip(STATISTICS, values, second[vocab_size], strict=True):
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(ours, densely(statistic, vocab_size), rtol=1e-12, atol=1e-12)
