"""The conversion benchmark's rows. How fast and how small it is depends on machine and size, and is not tested."""

from __future__ import annotations

from pathlib import Path

import pytest

from owpo_megatron.bench.convert import measure, timed


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step runs, in this process and at a tiny shape, and nothing is left behind."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shape = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    logged: list[str] = []
    rows = list(measure(tmp_path / "work", 2, 1, logged.append, timed, **shape))
    assert [row["what"] for row in rows] == ["copy", "import", "prove", "export"] == logged[1:]
    for row in rows:
        assert row["megabytes"] == rows[0]["megabytes"] > 0.1
        assert row["seconds"] >= 0 and row["peak_rss_mb"] > 100
        assert row["times_copy"] > 0
    assert list((tmp_path / "work").iterdir()) == []
