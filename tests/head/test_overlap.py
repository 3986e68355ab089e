"""megatron's overlapped gradient reduction with a head that adds to main_grad during the forward: two ranks, gloo.

That the gradients themselves are right is test_policy_head.py's part, and the parallel room's parity tests'.
"""

from __future__ import annotations

from pathlib import Path

from overlap_worker import compare
from rank_pool import Ranks
from tiny import make_hf_model


def test_overlapped_reduction_gives_the_same_gradients(ranks: Ranks, tmp_path: Path) -> None:
    found = ranks.run(2, compare, make_hf_model(tmp_path / "model"))[0]
    assert [(case["tied"], len(case["names"])) for case in found] == [(False, 3), (True, 2)]
    for case in found:
        assert case["same"] and case["ranks_agree"] and case["smallest"] > 1e-3, case
