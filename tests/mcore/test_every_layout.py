"""Every layout of two and four ranks, and three sizes of 2 on eight, with every family: the parity of test_parity.py.

Part of `make matrix`. Not covered: experts that ranks share at ep > 1, tp or pp of 8.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import train_dense
from parity_worker import batches, distances
from rank_pool import Ranks
from test_parity import FAMILIES, check
from tiny import make_hf_model

pytestmark = pytest.mark.matrix


def layouts(experts: bool) -> list[dict[str, Any]]:
    """Layouts with sequence parallelism wherever tensors are split, as experts need it; dense ones also without."""
    found: list[dict[str, Any]] = []
    for tp, pp, dp, cp in product((1, 2, 4), repeat=4):
        if tp * pp * dp * cp not in (2, 4) and sorted((tp, pp, dp, cp)) != [1, 2, 2, 2]:
            continue
        for vpp in (None, 2) if pp == 2 else (None,):
            for sp in (True,) if experts and tp > 1 else (False, True) if tp > 1 else (False,):
                for ep in (1, 2, 4) if experts else (1,):
                    etp = 1 if tp > 1 and ep > 1 else None  # gloo cannot do what sharing them needs
                    if dp * cp * (tp if etp else 1) % ep == 0:
                        sizes = {"tp": tp, "cp": cp, "pp": pp, "dp": dp, "vpp": vpp, "sp": sp, "ep": ep}
                        found.append(sizes | ({"etp": etp} if etp else {}))
    return found


def name_of(layout: dict[str, Any]) -> str:
    sizes = (f"{axis}{size}" for axis, size in layout.items() if axis != "sp" and ((size or 1) > 1 or axis == "etp"))
    return "-".join([*sizes, *(["sp"] if layout["sp"] else [])])


CASES = [
    pytest.param(family, layout, id=f"{family}-{name_of(layout)}")
    for family in FAMILIES
    for layout in layouts(experts=family == "qwen3_moe")
]


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """family -> (HF folder of a model whose heads four ranks can share, file with the oracle's results)."""
    root, found = tmp_path_factory.mktemp("every_layout"), {}
    for family, fields in FAMILIES.items():
        model = make_hf_model(root / family, family, **({"num_key_value_heads": 4} | fields))
        torch.save(train_dense(model, batches(), lr=1e-3, warmup=2), root / f"{family}.pt")
        found[family] = (model, root / f"{family}.pt")
    return found


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_three_updates_equal_the_dense_oracle(
    ranks: Ranks, oracles: dict[str, tuple[Path, Path]], family: str, layout: dict[str, Any]
) -> None:
    model, oracle = oracles[family]
    count = layout["tp"] * layout["cp"] * layout["pp"] * layout["dp"]
    (found,) = ranks.run(count, distances, [{"model": str(model), "oracle": str(oracle), "layouts": [layout]}])[0]
    check(found)
