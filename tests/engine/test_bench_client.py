"""The client's benchmark: what it measures is what was recorded. How fast it is depends on the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from owpo_megatron.bench.client import bench_client, bench_in_flight, figures, made_rollouts, recorded_rollouts
from owpo_megatron.engine import rollouts_path, save_rollouts

WORKS = ["request", "pack", "broadcast", "save", "memory"]


@pytest.mark.process
def test_blocks_cost_less_than_objects(tmp_path: Path) -> None:
    """Seconds by a wide margin, bytes by their number: 8 per token, and a little for what else a rollout has."""
    save_rollouts(rollouts_path(tmp_path, 1), made_rollouts(6, 3000))
    rows = bench_client(recorded_rollouts(rollouts_path(tmp_path, 1), 4), print)
    assert [(row["work"], row["tokens_as"]) for row in rows] == [
        *((work, kind) for work in WORKS for kind in ("objects", "blocks")),
        ("request by a worker", "blocks"),
    ]
    by_name = {(row["work"], row["tokens_as"]): row for row in rows}
    for work in ("broadcast", "save"):
        ours, theirs = by_name[work, "blocks"], by_name[work, "objects"]
        assert ours["ms_per_response"] < theirs["ms_per_response"] / 2
        assert 8 <= ours["bytes_per_token"] < 9 and theirs["bytes_per_token"] > 12
    assert by_name["memory", "blocks"]["bytes_per_token"] < 12 < 60 < by_name["memory", "objects"]["bytes_per_token"]
    assert by_name["request by a worker", "blocks"]["ms_per_response"] < by_name["request", "blocks"]["ms_per_response"]
    works = ("broadcast", "pack", "request", "request_by_a_worker", "save")
    assert sorted(figures(rows)) == sorted(f"{work}_ms_per_response" for work in works)


@pytest.mark.process
def test_requests_in_flight_are_in_flight_together() -> None:
    """The server answers none before it has all of a round; what they cost in threads does not depend on the number."""
    few, many = (bench_in_flight(count, print) for count in (5, 200))
    assert (few["requests"], many["requests"]) == (5, 200) and few["threads"] == many["threads"]
