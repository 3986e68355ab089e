"""A thread per rank that ends a run which makes no progress: stacks into the logs, one line, exit code 1.

    main thread   phase("update"), beat(), beat(), ...       beats while work goes on
    this thread   every tick: writes the rank's pulse (run/heartbeat.py), looks at those of the others

A run hangs when no rank has worked for as long as the phase it is in allows. Ranks that wait for rank 0 to generate do
not count. Whoever finds it leaves a note; every rank that still runs then writes the stacks of its threads. A rank that
is stopped altogether cannot write; the others name it, and the launcher ends a run all of whose ranks are stopped.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from owpo_megatron.config import ChecksConfig, EngineConfig
from owpo_megatron.run.heartbeat import Pulse, Pulses, Stillness, pulse_file, write_pulse
from owpo_megatron.types import Progress

MEASURED_LEAST, UNMEASURED = 300.0, 1800.0  # seconds
LONGEST_TIMES = 10  # the longest pause so far, times this, is still no hang
LONGEST_MEASURED = 7200.0  # seconds, whatever was measured: time-outs of the process groups come after it
LONGEST_TICK = 5.0
ENGINE_PHASES = ("start", "rollout", "evaluate", "sync", "logp_ref")
WAITING = "waiting for rank 0"
WRITING = "checkpoint, being written"  # a pause here is one of the disk's, and a flush of much data is long
MOST_PEERS = 64  # above, only rank 0 and the own rank are looked at


class Watchdog:
    """Counts this rank's progress; `running` watches all ranks'.

    Args:
        logs: where pulses, stacks and the error file go.
        abort_engines: makes the engines' main processes write their stacks, and ends them.
    """

    def __init__(
        self,
        config: ChecksConfig,
        engine: EngineConfig,
        logs: Path,
        rank: int,
        world_size: int,
        abort_engines: Callable[[], None] = lambda: None,
    ):
        self._fixed = config.hang_seconds
        self._engine_seconds = engine_seconds(engine)
        self._logs, self._rank = logs, rank
        self.abort_engines = abort_engines
        self._peers = range(world_size) if world_size <= MOST_PEERS else sorted({0, rank})
        self._longest: dict[str, float] = {}  # pause between two beats, by phase
        self._beats, self._step, self._phase, self._last = 0, 0, "start", time.monotonic()
        self._done = threading.Event()

    @property
    def step(self) -> int:
        """The step under way, counted from 1; 0 before the first."""
        return self._step

    # ------------------------------------------------------------------------------------------ the rank's work
    def beat(self) -> None:
        """Note progress."""
        now = time.monotonic()
        pause = now - self._last
        if pause > self._longest.get(self._phase, -1.0):
            self._longest[self._phase] = pause
        self._beats, self._last = self._beats + 1, now

    def begin(self, step: int) -> None:
        """Note that a step begins, counted from 1."""
        self.beat()
        self._step, self._phase = step, "between phases"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A block of work of one kind; its pauses are measured apart from those of others."""
        self.beat()
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self.beat()
            self._phase = before

    def beating(self, progress: Progress) -> Progress:
        """The same progress, each call of which is a beat."""

        def note(done: int, total: int) -> None:
            self.beat()
            progress(done, total)

        return note

    def noting(self, say: Callable[[str], None]) -> Callable[[str], None]:
        """The same messages, each of which is a beat."""

        def note(text: str) -> None:
            self.beat()
            say(text)

        return note

    def waiting(self) -> AbstractContextManager[None]:
        """A block in which this rank waits for rank 0 to do its work."""
        return self.phase(WAITING)

    def limit(self, phase: str) -> float:
        """Seconds without a beat that are too many; 0: any number is fine."""
        if phase == WAITING:
            return 0.0
        if self._fixed is not None:
            return self._fixed
        longest = None if phase == WRITING else self._longest.get(phase)
        measured = min(max(MEASURED_LEAST, LONGEST_TIMES * (longest or 0.0)), LONGEST_MEASURED)
        limit = UNMEASURED if longest is None else measured
        return limit + (self._engine_seconds if phase in ENGINE_PHASES else 0.0)

    # ------------------------------------------------------------------------------------------ the thread
    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch inside the block, which must be the work of a process that may be ended."""
        if self._fixed == 0:
            yield
            return
        self._logs.mkdir(parents=True, exist_ok=True)
        self._note.unlink(missing_ok=True)
        self._last = time.monotonic()
        self._give_pulse(0)  # a rank that is stopped before the thread's first look has been there, too
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join(1.0)
            faulthandler.cancel_dump_traceback_later()
            pulse_file(self._logs, self._rank).unlink(missing_ok=True)

    @property
    def _note(self) -> Path:
        return self._logs / "hang.txt"

    def _watch(self) -> None:
        tick = LONGEST_TICK if self._fixed is None else min(LONGEST_TICK, self._fixed / 5)
        pulses, ticks = Pulses(self._logs, self._peers, every=tick), 0
        while not self._done.wait(tick):
            ticks += 1
            limit = self.limit(self._phase)
            # Where this thread is stuck, too (a disk that hangs, code that keeps the interpreter's lock): no thread of
            # Python's is needed to end the process then.
            faulthandler.dump_traceback_later(2 * limit + 60 if limit else 86400, exit=True)
            self._give_pulse(ticks)
            if self._note.exists():
                self._write_stacks()
                continue  # the rank that found it ends the run
            found = pulses.look()
            self._last += pulses.missed
            if (
                found
                and not any(one.works for one in found.values())
                and any(one.pulse.limit for one in found.values())
            ):
                self._end(hang_of(found, 4 * tick), tick)

    def _give_pulse(self, ticks: int) -> None:
        pulse = Pulse(ticks, self._beats, self._step, self._phase, self.limit(self._phase))
        with suppress(OSError):  # a full disk ends the run with a reason of its own
            write_pulse(self._logs, self._rank, pulse)

    def _end(self, what: str, tick: float) -> None:
        try:
            with suppress(OSError), self._note.open("x") as note:  # another rank's, or a full disk
                note.write(what + "\n")
            self._write_stacks()
            time.sleep(3 * tick)  # for the others' stacks
            self.abort_engines()
            text = f"{what}; the stacks of all ranks are in {self._logs}/stacks_rank_*.txt"
            with suppress(OSError):
                (self._logs / f"error_rank_{self._rank}.txt").write_text(text + "\n")
            print(text, file=sys.stderr, flush=True)
        finally:
            os._exit(1)  # whatever could not be written

    def _write_stacks(self) -> None:
        file = self._logs / f"stacks_rank_{self._rank}.txt"
        with suppress(OSError), file.open("w") as stacks:
            stacks.write(f"step {self._step}, phase {self._phase}\n")
            stacks.flush()
            faulthandler.dump_traceback(stacks, all_threads=True)


def engine_seconds(engine: EngineConfig) -> float:
    """Seconds for which an engine may keep a rank waiting before it counts as lost, or its start as failed."""
    return engine.request_timeout + engine.startup_timeout


def longest_limit(checks: ChecksConfig, engine: EngineConfig) -> float:
    """The largest limit that a watchdog has in any phase, whatever it measures; 0: there is none.

    Example:
        >>> longest_limit(ChecksConfig(), EngineConfig(request_timeout=600, startup_timeout=300))
        8100.0
    """
    if checks.hang_seconds is not None:
        return checks.hang_seconds
    return max(LONGEST_MEASURED, UNMEASURED) + engine_seconds(engine)


def hang_of(found: dict[int, Stillness], dead: float) -> str:
    """Describe a run that makes no progress.

    Args:
        dead: seconds without a tick after which a process does not run.
    """
    longest = max((one for one in found.values() if one.pulse.limit), key=lambda one: one.beat_seconds)
    pulse = longest.pulse
    where = f"in phase {pulse.phase}" + (f" of step {pulse.step}" if pulse.step else "")
    text = f"the run hangs: no progress on any rank for {longest.beat_seconds:.0f} s {where}"
    stopped = sorted(rank for rank, one in found.items() if one.tick_seconds > dead)
    if stopped:
        names = ", ".join(f"rank {rank}" for rank in stopped)
        text += f"; {names} {'do' if len(stopped) > 1 else 'does'} not run (stopped, or its machine is)"
    return text
