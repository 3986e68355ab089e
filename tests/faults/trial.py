"""One run of the quickstart's first steps with a fault in it, and what must not come of it.

The run replays the committed rollouts of a real quickstart (tests/data/golden), so that its numbers are known bit for
bit without an engine. Whatever a fault does, four things must not happen, each an exception here.
"""

from __future__ import annotations

import json
import lzma
import os
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fault_rank
import yaml
from ended import Ended, Hang, Lost, Wrong
from owpo import ROOT, Owpo, lines_of, newest_step, steps_of
from rank_pool import Job, Ranks

from owpo_megatron.config import Config
from owpo_megatron.launch.reason import first_reason

GOLDEN = ROOT / "tests" / "data" / "golden"
STEPS = 4
LIMIT = float(
    os.environ.get("OWPO_FAULTS_LIMIT", "150")
)  # seconds within which a run ends, on a busy machine: what takes longer hangs


# What a fault that was overcome leaves in a line.
LEFT_OVER = ("engine_restarts", "damaged_checkpoints", "workers_lost")


class Running:
    """A run that is going on, by command or on forked ranks."""

    def __init__(self, process: Owpo | Job, logs: Path):
        self._process, self._logs, self._began = process, logs, time.monotonic()

    @property
    def text(self) -> str:
        process = self._process
        return process.stdout + process.stderr if isinstance(process, Owpo) else process.output

    def pids(self) -> dict[int, int]:
        """Process ids of the ranks."""
        if isinstance(self._process, Owpo):
            return {rank: process.pid for rank, process in self._process.ranks().items()}
        return {number: rank.process.pid for number, rank in enumerate(self._process.ranks)}

    def is_running(self) -> bool:
        process = self._process
        return process.process.poll() is None if isinstance(process, Owpo) else process.is_running()

    def wait_until(self, condition: Callable[[], Any], what: str, every: float = 0.005) -> None:
        """Wait for a condition; the run must not end before."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            if not self.is_running():
                raise Wrong(f"ended before {what}:\n{self.text[-2000:]}")
            if time.monotonic() > deadline:
                self.kill()
                raise Hang(f"no {what}:\n{self.text[-2000:]}")
            time.sleep(every)

    def signal(self, number: signal.Signals, rank: int | None = None) -> None:
        """Signal one rank, or all of them as the command does."""
        if rank is None and isinstance(self._process, Owpo):
            self._process.signal(number)
            return
        for index, pid in self.pids().items():
            if rank in (None, index):
                os.kill(pid, number)

    def kill(self) -> None:
        """SIGKILL to every process at once, as on a machine that loses its power."""
        self._process.kill()

    def wait(self, limit: float = LIMIT) -> Ended:
        """Wait for the end; on forked ranks the failure of one ends the others after a while, as torchrun does."""
        deadline = time.monotonic() + limit
        while self.is_running():
            if isinstance(self._process, Job) and any(rank.process.exitcode for rank in self._process.ranks):
                deadline = min(deadline, time.monotonic() + 5.0)
                if time.monotonic() >= deadline - 0.05:
                    break
            if time.monotonic() > deadline:
                text = self.text
                self.kill()
                raise Hang(f"no end within {limit:g} s:\n{text[-2000:]}")
            time.sleep(0.02)
        return Ended(self._code(), self._told(), time.monotonic() - self._began)

    def _code(self) -> int:
        if isinstance(self._process, Owpo):
            return self._process.wait()
        for rank in self._process.ranks:
            with suppress(EOFError):  # the usual end: the process ended with an exit code of its own
                if rank.answers.poll():
                    raise AssertionError(rank.answers.recv()[1])
        codes = [rank.process.exitcode for rank in self._process.ranks]
        self._process.kill()
        return next((code if code > 0 else 1 for code in codes if code), 0)

    def _told(self) -> str:
        """Return what was printed, and on forked ranks the line that the command makes of their error files."""
        if isinstance(self._process, Owpo):
            return self.text
        printed = re.sub(r"(?ms)^Traceback .*", "", self.text)  # stderr, which the command sends to logs/rank_N.log
        printed = "\n".join(line for line in printed.splitlines() if not line.startswith("error: "))
        if not (code := self._code()):
            return printed
        killed = next(
            (
                (number, -rank.process.exitcode)
                for number, rank in enumerate(self._process.ranks)
                if (rank.process.exitcode or 0) < 0 and rank.process.exitcode != -signal.SIGTERM
            ),
            None,
        )
        reason = first_reason(self._logs, killed if code == 1 else None)
        assert reason is not None, f"exit code {code} without a reason: {self.text[-2000:]}"
        return f"{printed}\n{'error' if reason.code == 2 else 'failed'}: {reason.reason}"


@dataclass
class Ground:
    """The shared part of all trials: forked ranks, recorded rollouts, and the run without a fault."""

    folder: Path
    ranks: Ranks
    straight: dict[int, Path] = field(default_factory=dict)  # run folder by tensor-parallel size

    @property
    def rollouts(self) -> Path:
        folder = self.folder / "rollouts"
        if not folder.is_dir():
            folder.mkdir(parents=True)
            recorded = lzma.decompress((GOLDEN / "rollouts.jsonl.xz").read_bytes())
            (folder / "step_000001.jsonl").write_bytes(recorded)
        return folder

    def settings(self, runs_dir: Path) -> dict[str, Any]:
        """Sections of four steps of the quickstart, with a swap after two and a checkpoint after each."""
        raw = yaml.safe_load((ROOT / "examples" / "quickstart" / "config.yaml").read_text())
        raw |= {"name": "run", "runs_dir": str(runs_dir), "model": {"path": str(GOLDEN / "base_model")}}
        raw["rollout"] |= {"replay": str(self.rollouts)}
        raw["optimizer"] |= {"steps": STEPS}
        raw["reference"] |= {"every": 2}
        raw["parallel"] = {"tp": 1}
        raw["eval"] = {"before": False, "after": False}
        raw["checkpoint"] = {"every": 1, "keep": 3}
        return raw

    def without_fault(self, tp: int) -> Path:
        """The folder of a run in which nothing went wrong; made once."""
        if tp not in self.straight:
            trial = Trial(self, self.folder / f"straight_{tp}", random.Random(0), "ranks")
            trial.train(tp=tp).done()
            self.straight[tp] = trial.run_dir
        return self.straight[tp]


class Trial:
    """A folder with a configuration, runs of it, and the verdict on how they ended.

    Args:
        rng: whatever a fault leaves open (moments, bytes, ranks) is drawn from it.
        by: how the fault is injected; see registry.py.
    """

    def __init__(self, ground: Ground, folder: Path, rng: random.Random, by: str):
        self.ground, self.folder, self.rng, self.by = ground, folder, rng, by
        self.run_dir = folder / "runs" / "run"
        self.tp = 1
        self.path: Path | None = None  # modules of the trial's own
        folder.mkdir(parents=True, exist_ok=True)
        self.settings = ground.settings(folder / "runs")
        self.logs = self.run_dir / "logs"

    def start(
        self, *overrides: str, tp: int | None = None, before: str | None = None, argument: object = None
    ) -> Running:
        """Start the run, or go on with it.

        Args:
            before: on forked ranks alone: `module:function` that breaks something in each rank's process.
        """
        self.tp = tp or self.tp
        file = self.folder / "run.yaml"
        file.write_text(yaml.safe_dump(self.settings | {"parallel": {"tp": self.tp}}))
        if self.by == "command":
            assert before is None, "the command is started as a user starts it"
            return Running(
                Owpo(self.folder / "out", "train", "-c", str(file), *overrides, **self._environment()), self.logs
            )
        config = Config.load(file, list(overrides))
        self.logs.mkdir(parents=True, exist_ok=True)
        for stale in self.logs.glob("error_rank_*.txt"):
            stale.unlink()
        config.save(self.run_dir / "config.yaml")
        resolved, path = str(self.run_dir / "config.yaml"), self._environment().get("PYTHONPATH")
        job = self.ground.ranks.start(self.tp, fault_rank.train, resolved, path, before, argument)
        return Running(job, self.logs)

    def _environment(self) -> dict[str, str]:
        return (
            {} if self.path is None else {"PYTHONPATH": f"{self.path}{os.pathsep}{os.environ.get('PYTHONPATH', ROOT)}"}
        )

    def train(self, *overrides: str, limit: float = LIMIT, **how: Any) -> Ended:
        """The same, to the end."""
        return self.start(*overrides, **how).wait(limit)

    def owpo(self, *arguments: str, limit: float = LIMIT) -> Ended:
        """Another `owpo` command, to its end."""
        return Running(Owpo(self.folder / "out", *arguments), self.logs).wait(limit)

    # ------------------------------------------------------------------------------------------ the run so far
    def step(self) -> int:
        return newest_step(self.run_dir)

    def reached(self, step: int) -> Callable[[], bool]:
        return lambda: self.step() >= step

    def saved(self) -> list[int]:
        """Steps of the checkpoints that are in place."""
        return sorted(int(one.parent.name[-6:]) for one in self.run_dir.glob("checkpoints/step_??????/manifest.json"))

    def checkpoint(self, step: int) -> Path:
        return self.run_dir / "checkpoints" / f"step_{step:06d}"

    # ------------------------------------------------------------------------------------------ verdicts
    def goes_on(self, *overrides: str, at_least: int = 0, pattern: str = "", **how: Any) -> Ended:
        """Resume from a checkpoint of this step or a later one, and end as if nothing had happened."""
        ended = self.train(*overrides, **how).done(pattern)
        found = re.search(r"resumed at step (\d+)", ended.text)
        if at_least and (found is None or int(found[1]) < at_least):
            raise Lost(f"step {at_least} was saved, and the run resumed elsewhere:\n{ended.text[-2000:]}")
        self.same_as_without()
        return ended

    def same_as_without(self) -> None:
        """Every line of metrics.jsonl but its seconds, and the exported weights, bit for bit."""
        straight = self.ground.without_fault(self.tp)
        ours, theirs = steps_of(self.run_dir), steps_of(straight)
        if [_comparable(line) for line in ours] != [_comparable(line) for line in theirs]:
            raise Wrong(f"other numbers: {ours} against {theirs}")
        for file in sorted((straight / "hf").glob("*.safetensors")):
            if (self.run_dir / "hf" / file.name).read_bytes() != file.read_bytes():
                raise Wrong(f"other weights in {file.name}")

    def is_noted(self, **values: Any) -> None:
        """Require a line of metrics.jsonl with these values."""
        if not any(all(line.get(name) == value for name, value in values.items()) for line in lines_of(self.run_dir)):
            raise Wrong(f"no line has {values}: {lines_of(self.run_dir)}")

    def lines_are_json(self) -> None:
        """Require that metrics.jsonl has numbers that JSON has: neither NaN nor Infinity."""
        for line in lines_of(self.run_dir):
            json.loads(json.dumps(line), parse_constant=_no_json)


def _comparable(line: dict[str, Any]) -> dict[str, Any]:
    """A line without what a fault that was overcome leaves in it."""
    return {name: value for name, value in line.items() if name not in LEFT_OVER}


def _no_json(constant: str) -> None:
    raise Wrong(f"{constant} in metrics.jsonl")
