"""The `owpo` command as a process of its own: started, watched, signalled, killed, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from owpo_megatron.launch.rank import PROCESS_NAME

ROOT = Path(__file__).resolve().parents[1]


class Owpo:
    """One `owpo ...` process. stdout and stderr go to files, so that nothing waits for a reader."""

    def __init__(self, out_dir: Path, *arguments: str, **environment: str):
        out_dir.mkdir(parents=True, exist_ok=True)
        number = len(list(out_dir.glob("*.stdout")))
        self._stdout, self._stderr = out_dir / f"{number}.stdout", out_dir / f"{number}.stderr"
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"} | environment
        with self._stdout.open("w") as out, self._stderr.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "owpo_megatron.cli.main", *arguments],
                cwd=ROOT, env=env, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip
        self.family: dict[int, psutil.Process] = {}

    @property
    def stdout(self) -> str:
        return self._stdout.read_text()

    @property
    def stderr(self) -> str:
        return self._stderr.read_text()

    def tree(self) -> list[psutil.Process]:
        """The processes below this one; those seen are remembered for `survivors`."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            found = []
        self.family.update({process.pid: process for process in found})
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """Trainer processes by rank."""
        found = {}
        for process in self.tree():
            try:
                name, _, rank = process.name().rpartition("-")
                if f"{name}-" == PROCESS_NAME:
                    found[int(rank)] = process
            except psutil.Error:
                continue  # it ended meanwhile
        return found

    def wait_until(self, condition: Callable[[], Any], what: str, timeout: float = 60, every: float = 0.02) -> None:
        """Wait for a condition; the process must not end before."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"ended before {what}: {self.told()}"
            assert time.monotonic() < deadline, f"no {what} within {timeout} s: {self.told()}"
            time.sleep(every)
        self.tree()

    def wait(self, timeout: float = 120) -> int:
        """The exit code."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            self.tree()
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no end within {timeout} s: {self.told()}")
            time.sleep(0.2)
        return self.process.returncode

    def done(self, timeout: float = 120) -> str:
        """Its stdout, after it ended with exit code 0."""
        assert self.wait(timeout) == 0, self.told()
        return self.stdout

    def kill(self) -> None:
        """SIGKILL to everything at once, trainer ranks first; as a machine that loses its power."""
        tree = self.tree()
        for process in tree:
            try:
                process.suspend()
            except psutil.NoSuchProcess:
                pass  # it ended meanwhile
        for process in (*tree, psutil.Process(self.process.pid)):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self.process.wait()

    def kill_family(self) -> None:
        """SIGKILL to processes that outlived the command."""
        for process in self.family.values():
            if process.is_running():
                process.kill()

    def signal(self, number: signal.Signals) -> None:
        self.tree()
        self.process.send_signal(number)

    def survivors(self, patience: float = 10) -> list[str]:
        """Command lines of processes of this tree that still run a while after its end."""
        _, alive = psutil.wait_procs(list(self.family.values()), timeout=patience)
        return [" ".join(p.cmdline()) for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def told(self) -> str:
        return f"exit code {self.process.poll()}\n{self.stdout[-3000:]}\n{self.stderr[-3000:]}"


def write_config(path: Path, *layers: dict[str, Any]) -> Path:
    """A YAML file of sections, later layers merged over earlier ones."""
    raw: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            raw[name] = raw.get(name, {}) | value if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(raw))
    return path


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl; [] before there is one."""
    file = run_dir / "metrics.jsonl"
    if not file.exists():
        return []
    texts = file.read_text().split("\n")[:-1]
    return [json.loads(text) for text in texts]


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return step lines without times."""
    lines = [line for line in lines_of(run_dir) if "seconds" in line]
    return [{name: value for name, value in line.items() if name not in ("seconds", "speed")} for line in lines]


def newest_step(run_dir: Path) -> int:
    """Return the step of the last line; 0 before the first."""
    lines = lines_of(run_dir)
    return max((line["step"] for line in lines), default=0)


def without(line: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in names}


def values(lines: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return [line.get(name) for line in lines]
