"""Signs of life of a run's ranks: logs/alive_rank_N.json, written by each rank, read by the others and the launcher.

Clocks of machines differ and jump, so that no time is in the files: a reader notes by its own monotonic clock when a
file last changed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from owpo_megatron.run.files import write_whole

_STOPPED = 5.0  # seconds by which a reader is late that was stopped, and not only busy


@dataclass(frozen=True)
class Pulse:
    """A rank's last sign of life.

    Example:
        Pulse(ticks=812, beats=4077, step=12, phase="update", limit=300.0)
    """

    ticks: int  # grows as long as the process runs
    beats: int  # grows as its work goes on
    step: int
    phase: str
    limit: float  # seconds without a beat that are too many; 0: it waits for another rank


@dataclass(frozen=True)
class Stillness:
    """Time for which a rank has been still, by the reader's clock."""

    pulse: Pulse
    beat_seconds: float  # since its last beat
    tick_seconds: float  # since its last tick

    @property
    def works(self) -> bool:
        """False: it waits for another rank, or makes no progress."""
        return self.pulse.limit > 0 and self.beat_seconds <= self.pulse.limit


def pulse_file(logs: Path, rank: int) -> Path:
    return logs / f"alive_rank_{rank}.json"


def write_pulse(logs: Path, rank: int, pulse: Pulse) -> None:
    write_whole(pulse_file(logs, rank), json.dumps(asdict(pulse)))


class Pulses:
    """Reads the pulses of these ranks, again and again.

    A reader that was stopped itself, as a job that Slurm suspends, knows nothing about that time: it counts for nobody.

    Args:
        clock: monotonic seconds.
        every: seconds between two looks; a longer time than _STOPPED on top was not looked at.
    """

    def __init__(
        self, logs: Path, ranks: Sequence[int], clock: Callable[[], float] = time.monotonic, every: float = math.inf
    ):
        self._logs, self._ranks, self._clock, self._every = logs, ranks, clock, every
        self._seen: dict[int, tuple[Pulse, float, float]] = {}  # pulse, time of its beat, time of its tick
        self._looked: float | None = None
        self.missed = 0.0
        """Seconds before the last look in which nobody looked."""

    def look(self) -> dict[int, Stillness]:
        """Stillness of every rank that has a pulse."""
        now = self._clock()
        late = 0.0 if self._looked is None else now - self._looked - self._every
        self._looked, self.missed = now, late if late > _STOPPED else 0.0
        if self.missed:
            for rank, (pulse, beat, tick) in self._seen.items():
                self._seen[rank] = (pulse, beat + self.missed, tick + self.missed)
        for rank in self._ranks:
            with suppress(OSError, ValueError, TypeError):  # not there yet, or gone
                pulse = Pulse(**json.loads(pulse_file(self._logs, rank).read_text()))
                before, beat, tick = self._seen.get(rank, (None, now, now))
                moved = before is None or (pulse.beats, pulse.phase) != (before.beats, before.phase)
                ticked = before is None or pulse.ticks != before.ticks
                self._seen[rank] = (pulse, now if moved else beat, now if ticked else tick)
        return {rank: Stillness(pulse, now - beat, now - tick) for rank, (pulse, beat, tick) in self._seen.items()}
