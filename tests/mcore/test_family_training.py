"""Three OWPO updates of every family against the dense oracle (dense.py), as test_parity.py does for the first ones.

One rank: the first shape of each family. Two ranks: every layout that its shape allows, in `make test-extra`; all
shapes in `make matrix`. Not covered: CUDA, Transformer Engine's layers, experts that ranks share at ep > 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense import train_dense
from family_cases import CASES, WINDOWED, every_case
from parity_worker import batches, distance, distances
from rank_pool import Ranks
from tiny import make_hf_model

from owpo_megatron.config import ParallelConfig
from owpo_megatron.errors import UserError
from owpo_megatron.families import check_parallel, read_hf_config

TOLERANCE = 1e-5
# the delta rule sums in float32 in another order than the oracle, and a norm of small values follows it
WIDER = dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), 1e-4)
LAYOUTS: list[dict[str, Any]] = [
    *({"tp": 2, "sp": True}, {"tp": 2}, {"pp": 2}, {"dp": 2}, {"dp": 2, "ep": 2}, {"cp": 2}),
    {"tp": 2, "sp": True, "ep": 2, "etp": 1},
]


@pytest.fixture
def oracle(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """(HF folder, file with the oracle's results) of a family's shape."""
    family, shape = request.param
    model = make_hf_model(tmp_path / "hf", family, **shape)
    torch.save(train_dense(model, batches(), lr=1e-3, warmup=2), tmp_path / "oracle.pt")
    return model, tmp_path / "oracle.pt"


def check(found: dict[str, Any], model: Path) -> None:
    tolerance = WIDER.get(read_hf_config(model).family_name, TOLERANCE)
    errors = {name: found[name] for name in ("logp", "loss", "grad_norm", "weights")}
    assert max(errors.values()) < tolerance, (found.get("layout"), errors)
    assert found["names"], "named_weights and the HF checkpoint name different tensors"
    assert found["moved"] > 100 * TOLERANCE, "the updates changed too little for a comparison"


def fits(model: Path, layout: dict[str, Any]) -> bool:
    try:
        check_parallel(read_hf_config(model), ParallelConfig(**layout))
    except UserError:
        return False
    return True


FIRST = [
    *(pytest.param((family, shapes[0]), id=family) for family, shapes in CASES.items()),
    *(pytest.param((family, shape), id=f"{family}-window") for family, shape in WINDOWED.items()),
]
ALL = [pytest.param(tuple(case.values), id=case.id, marks=case.marks or pytest.mark.extra) for case in every_case()]


@pytest.mark.parametrize("oracle", FIRST, indirect=True)
def test_one_rank(oracle: tuple[Path, Path]) -> None:
    model, file = oracle
    check(distance(model, torch.load(file), {"tokens_per_microbatch": 24})[1], model)


@pytest.mark.parametrize("oracle", ALL, indirect=True)
def test_two_ranks(oracle: tuple[Path, Path], ranks: Ranks) -> None:
    model, file = oracle
    layouts = [layout for layout in LAYOUTS if fits(model, layout)]
    assert len(layouts) >= 2
    case = {"model": str(model), "oracle": str(file), "layouts": layouts}
    results = ranks.run(2, distances, [case])[0]
    assert len(results) == len(layouts)
    for found in results:
        check(found, model)
