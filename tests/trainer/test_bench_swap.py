"""The swap benchmark's result. How fast a swap is depends on machine and size, and is not tested."""

from __future__ import annotations

import pytest

from owpo_megatron.bench.swap import bench_swap
from owpo_megatron.errors import UserError


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_result(dtype: str) -> None:
    found = bench_swap(2_000_000, dtype, rounds=3)
    assert sorted(row["dtype"] for row in found["rows"]) == ["bfloat16", "float32"]
    first = found["rows"][0]
    assert first["dtype"] == dtype and first["rounds"] == 3
    assert {name: first[name] for name in ("swap_ms", "copy_ms", "speedup")} == {
        name: value for name, value in found.items() if name != "rows"
    }
    for row in found["rows"]:
        assert abs(row["parameters"] / 2_000_000 - 1) < 0.1
        bytes_each = {"bfloat16": 2, "float32": 4}[row["dtype"]]
        assert row["megabytes"] == pytest.approx(row["parameters"] * bytes_each / 1e6, rel=0.01)
        assert row["speedup"] == pytest.approx(row["copy_ms"] / row["swap_ms"])
        assert min(value for name, value in row.items() if name.endswith("_ms")) > 0
    assert "nothing is copied" in found["rows"][dtype != "bfloat16"]["note"]


def test_mistakes() -> None:
    with pytest.raises(UserError, match="dtype = float16: use one of bfloat16, float32"):
        bench_swap(2_000_000, "float16")
    with pytest.raises(UserError, match="params = 1000: use at least"):
        bench_swap(1000)
