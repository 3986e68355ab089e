"""The fault suite itself, and faults in three sizes: a few in `make test`, twenty in test-extra, 200 in the matrix.

`python tests/faults/suite.py --kind NAME --seed N` repeats one that failed.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from ended import Ended, Hang, TracebackShown, Wrong
from rank_pool import Ranks
from registry import Kind, kinds
from suite import Draw, Result, draws, inject, main, table
from trial import Ground

KINDS = kinds()


@pytest.fixture(scope="session")
def ground(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("faults"), ranks)


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.quick], ids=lambda kind: kind.name)
def test_quick_kinds(kind: Kind, ground: Ground, tmp_path: Path) -> None:
    result = inject(Draw(kind, kind.by[-1], seed=1), ground, tmp_path / "trial")
    assert result.outcome == "right", result.told


@pytest.mark.process
@pytest.mark.extra
@pytest.mark.timeout(3600)
def test_twenty_faults() -> None:
    """The same twenty each time: a failure belongs to the change. `make faults` draws others."""
    assert main(["--count", "20", "--seed", "1"]) == 0


@pytest.mark.process
@pytest.mark.matrix
@pytest.mark.timeout(4 * 3600)
def test_two_hundred_faults() -> None:
    assert main(["--count", "200"]) == 0


def test_draws_are_uniform_and_repeat() -> None:
    first = draws(2000, 7, KINDS)
    assert first == draws(2000, 7, KINDS) and first != draws(2000, 8, KINDS)
    counts = Counter(draw.kind.name for draw in first)
    assert set(counts) == {kind.name for kind in KINDS}
    expected = 2000 / len(KINDS)
    assert all(abs(count - expected) < 6 * expected**0.5 for count in counts.values())


@pytest.mark.parametrize("seed", range(5))
def test_a_fifth_goes_through_the_command(seed: int) -> None:
    drawn = draws(50, seed, KINDS)
    assert len(drawn) == 50 and sum(draw.by == "command" for draw in drawn) >= 10
    assert all(draw.by in draw.kind.by for draw in drawn)


BARE = ("failed: rank 0: KeyError: 'x'", "error: ValueError: y", "a\nTraceback (most recent call last):\n")


@pytest.mark.parametrize("text", BARE)
def test_a_traceback_is_seen(text: str) -> None:
    with pytest.raises(TracebackShown):
        Ended(1, text, 0.0)


def test_an_end_is_judged() -> None:
    Ended(1, "some lines\nfailed: rank 1 was ended by SIGKILL", 0.0).refused("rank 1 was ended")
    for code, text in ((0, "failed: rank 1"), (1, "failed: rank 2"), (1, "failed: rank 1\nfailed: rank 1")):
        with pytest.raises(Wrong):
            Ended(code, text, 0.0).refused("rank 1")
    with pytest.raises(Wrong):
        Ended(0, "stopped; saved up to step 3", 0.0).done()


def test_what_broke_is_counted(ground: Ground, tmp_path: Path) -> None:
    def hangs(trial: object) -> None:
        raise Hang("no end")

    def breaks(trial: object) -> None:
        raise KeyError("x")

    made = [Draw(Kind(name, "", ("part",), function), "part", 0) for name, function in (("a", hangs), ("b", breaks))]
    results = [inject(draw, ground, tmp_path / draw.kind.name) for draw in made]
    assert [result.outcome for result in results] == ["hang", "wrong result"]
    assert "the suite itself failed" in results[1].told
    fine = Result("a", "", "command", 0, "right", 1.0)
    assert table([*results, fine]).splitlines()[2:] == [
        "| a | 2 | 1 | 1 | 0 | 1 | 0 | 0 |",
        "| b | 1 | 0 | 0 | 1 | 0 | 0 | 0 |",
        "| all 2 kinds | 3 | 1 | 1 | 1 | 1 | 0 | 0 |",
    ]
