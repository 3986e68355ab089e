"""Limits from measured pauses, pulses by the reader's clock, and the line about a run that hangs.

The thread itself, with real processes that are stopped, is in tests/faults.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from owpo_megatron.config import ChecksConfig, EngineConfig
from owpo_megatron.launch.local import frozen_ranks
from owpo_megatron.mcore.topology import tensor_timeout
from owpo_megatron.run.heartbeat import Pulse, Pulses, Stillness, write_pulse
from owpo_megatron.trainer import watchdog as module
from owpo_megatron.trainer.watchdog import ENGINE_PHASES, WAITING, Watchdog, hang_of, longest_limit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def make(tmp_path: Path, **fields: float) -> Watchdog:
    engine = EngineConfig(request_timeout=40.0, startup_timeout=60.0)
    return Watchdog(ChecksConfig(**fields), engine, tmp_path, rank=0, world_size=2)  # type: ignore[arg-type]


def test_the_limit_comes_from_the_longest_pause(clock: Clock, tmp_path: Path) -> None:
    dog = make(tmp_path)
    assert dog.limit("update") == 1800 and dog.limit("rollout") == 1800 + 100 and dog.limit(WAITING) == 0
    with dog.phase("update"):
        clock.now += 5
        dog.beat()
        clock.now += 2
    assert dog.limit("update") == 300, "ten times five seconds, but not less than this"
    with dog.phase("update"):
        clock.now += 70
        with dog.phase("rollout"):
            clock.now += 1
        assert dog.limit("rollout") == 300 + 100
    assert dog.limit("update") == 700


def test_a_fixed_limit(tmp_path: Path) -> None:
    dog = make(tmp_path, hang_seconds=7.0)
    assert dog.limit("update") == dog.limit("rollout") == 7 and dog.limit(WAITING) == 0


PHASES = (*ENGINE_PHASES, "update", "checkpoint", "finish", "between phases")


@pytest.mark.parametrize("seconds", [None, 60.0, 3600.0])
@pytest.mark.parametrize("engine", [EngineConfig(), EngineConfig(request_timeout=14400.0, startup_timeout=3600.0)])
@pytest.mark.parametrize("measured", [None, 1.0, 170.0, 1700.0])
def test_the_time_outs_of_the_groups_come_later(
    seconds: float | None, engine: EngineConfig, measured: float | None, clock: Clock, tmp_path: Path
) -> None:
    """So that the watchdog's line, which names the rank and the phase, comes first: in every phase, also where ranks
    wait in a collective for rank 0, which waits for an engine, and whatever pauses were measured."""
    checks = ChecksConfig(hang_seconds=seconds)
    dog = Watchdog(checks, engine, tmp_path, rank=0, world_size=2)
    for phase in PHASES if measured is not None else ():
        with dog.phase(phase):
            clock.now += measured or 0.0
    later = tensor_timeout(longest_limit(checks, engine)).total_seconds()
    assert all(dog.limit(phase) + 4 * module.LONGEST_TICK < later for phase in PHASES)
    assert any(dog.limit(phase) == longest_limit(checks, engine) for phase in PHASES) or (measured or 0.0) < 720


def test_a_lost_engine_is_progress(clock: Clock, tmp_path: Path) -> None:
    """Its restart may take as long as its next answer: the run goes on, as far as engine.max_restarts allows."""
    dog, told = make(tmp_path), []
    with dog.phase("rollout"):
        clock.now += 90
        dog.noting(told.append)("engine 0 is lost")
        clock.now += 90
    assert told == ["engine 0 is lost"] and dog.limit("rollout") == 900 + 100


def test_pulses_are_timed_by_the_reader(tmp_path: Path) -> None:
    clock = Clock()
    pulses = Pulses(tmp_path, range(2), clock.monotonic)
    assert pulses.look() == {}
    write_pulse(tmp_path, 0, Pulse(1, 10, 3, "update", 5.0))
    write_pulse(tmp_path, 1, Pulse(1, 4, 3, "update", 5.0))
    pulses.look()
    clock.now += 4
    write_pulse(tmp_path, 0, Pulse(2, 10, 3, "update", 5.0))  # it runs, without progress
    found = pulses.look()
    assert (found[0].beat_seconds, found[0].tick_seconds) == (4, 0)
    assert (found[1].beat_seconds, found[1].tick_seconds) == (4, 4)
    assert found[0].works and found[1].works
    clock.now += 2
    assert not pulses.look()[0].works
    write_pulse(tmp_path, 0, Pulse(3, 11, 3, "update", 5.0))
    assert pulses.look()[0].works and not pulses.look()[1].works
    (tmp_path / "alive_rank_1.json").write_text("{")
    assert set(pulses.look()) == {0, 1}, "a pulse that cannot be read is as old as before"


def test_a_reader_that_was_stopped_blames_nobody(tmp_path: Path) -> None:
    """A job that is suspended as a whole, as Slurm does with SIGSTOP, goes on where it was."""
    clock = Clock()
    pulses = Pulses(tmp_path, range(1), clock.monotonic, every=5.0)
    write_pulse(tmp_path, 0, Pulse(1, 10, 3, "update", 300.0))
    pulses.look()
    clock.now += 5
    pulses.look()
    clock.now += 5 + 7200
    (found,) = pulses.look().values()
    assert (found.beat_seconds, found.tick_seconds, pulses.missed) == (10, 10, 7200)
    clock.now += 6
    (found,) = pulses.look().values()
    assert (found.beat_seconds, pulses.missed) == (16, 0.0), "a busy machine is late, too"


def test_a_rank_has_a_pulse_before_its_first_tick(tmp_path: Path) -> None:
    """One that is stopped within it would be unknown to the others, which then wait for it for ever."""
    with Watchdog(ChecksConfig(hang_seconds=600), EngineConfig(), tmp_path, rank=1, world_size=2).running():
        assert Pulses(tmp_path, [1]).look()[1].pulse.limit > 0


ENDS = """
import sys, time
from pathlib import Path
from owpo_megatron.config import ChecksConfig, EngineConfig
from owpo_megatron.trainer.watchdog import Watchdog
with Watchdog(ChecksConfig(hang_seconds=0.5), EngineConfig(), Path(sys.argv[1]), rank=0, world_size=1).running():
    time.sleep(600)
"""


@pytest.mark.process
def test_a_hang_ends_though_nothing_can_be_written(tmp_path: Path) -> None:
    """The disk of the logs is full, and the error file's place is taken: the line is on stderr alone."""
    (tmp_path / "stacks_rank_0.txt").symlink_to("/dev/full")
    (tmp_path / "error_rank_0.txt").mkdir()
    ended = subprocess.run([sys.executable, "-c", ENDS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "the run hangs: no progress on any rank" in ended.stderr


def still(phase: str, limit: float, beat: float, tick: float) -> Stillness:
    return Stillness(Pulse(9, 9, 12, phase, limit), beat, tick)


def test_a_hang_names_the_phase_and_who_does_not_run() -> None:
    found = {0: still("update", 5, 7, 0.5), 1: still("update", 5, 7, 7), 2: still(WAITING, 0, 90, 0.5)}
    assert hang_of(found, dead=4) == (
        "the run hangs: no progress on any rank for 7 s in phase update of step 12; rank 1 does not run (stopped, or "
        "its machine is)"
    )


def test_the_launcher_ends_ranks_that_are_all_stopped() -> None:
    assert frozen_ranks({}) == "", "ranks that have not begun yet"
    assert frozen_ranks({0: still("update", 5, 90, 90), 1: still("update", 5, 90, 1)}) == ""
    assert frozen_ranks({0: still("update", 5, 14, 14), 1: still(WAITING, 0, 90, 90)}) == ""
    assert "for 16 s" in frozen_ranks({0: still("update", 5, 16, 16), 1: still(WAITING, 0, 90, 90)})
