"""A pytest plugin that keeps the tiers apart: which tests run where, what a test may start, its CPU seconds.

The tiers are made of marks (docs/testing.md). Three things hold them:

- a fixture that starts ranks or an engine brings its mark along (`FIXTURES`), so `-m` never misses one of its tests;
- a test without one of the marks of `STARTERS` fails when it starts a process;
- CPU seconds are counted, the processes that a test started included: the slowest are listed at the end, `--cpu-limit`
  fails those above it, and `--cpu-json` writes all of them. Seconds of the clock are not: they depend on the machine.

Not seen: processes of `multiprocessing`'s spawn (no audit event), and CPU time of one that ended while nobody waited.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
STARTERS = ("process", "ranks", "server", "slurm", "nemo", "triton", "image", "gpu")
LONG = ("server", "ranks", "slurm")
FIXTURES = {"ranks": "ranks", "engine": "server", "server_url": "server"}
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")
PHASES = ("setup", "call", "teardown")
SLOWEST = 15


class Watch:
    """Limits of the running test, and the CPU time of this process with all below it."""

    def __init__(self) -> None:
        self._item: pytest.Item | None = None
        self._started = False
        sys.addaudithook(self._audit)

    def watch(self, item: pytest.Item | None) -> None:
        self._item = item

    def expect_processes(self) -> None:
        """Some are started in a way that has no audit event."""
        self._started = True

    def _audit(self, event: str, arguments: Any) -> None:
        if event not in STARTS:
            return
        self._started = True
        item = self._item
        if item is not None and not any(item.get_closest_marker(name) for name in STARTERS):
            raise PermissionError(
                f"{item.nodeid} starts a process; mark it `process` (or ranks, server: docs/testing.md)"
            )

    def cpu_seconds(self) -> float:
        """CPU seconds of this process, of those that it waited for, and of those below it that still run."""
        seconds = sum(os.times()[:4])
        for process in psutil.Process().children(recursive=True) if self._started else ():
            try:
                seconds += sum(process.cpu_times()[:4])
            except psutil.Error:
                continue  # it ended meanwhile
        return seconds


WATCH = Watch()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tiers")
    group.addoption("--cpu-limit", type=float, metavar="S", help="fail a test that takes more CPU seconds than S")
    group.addoption("--matrix-result", type=Path, metavar="FILE", help="write what `make matrix` found, as Markdown")
    group.addoption("--cpu-json", type=Path, metavar="FILE", help="write every test's CPU seconds as JSON")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Report(config), "tiers-report")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Import what is large before the first test: the one that came first would have to answer for it."""
    if session.config.getoption("cpu_limit") and session.items:
        importlib.import_module("rank_imports")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give marks to the users of fixtures, leave the matrix out unless asked for, and start the long files first.

    The order is for pytest-xdist (`--dist loadfile`), whose processes take file after file: a file with engines that
    came last would leave the other process idle.
    """
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        for fixture in getattr(item, "fixturenames", ()):
            if fixture in FIXTURES and fixture not in parameters:
                item.add_marker(FIXTURES[fixture])
    if "matrix" not in (config.getoption("markexpr") or ""):
        left_out = [item for item in items if item.get_closest_marker("matrix")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("matrix")]
    if hasattr(config, "workerinput"):
        long = {item.path for item in items if any(item.get_closest_marker(name) for name in LONG)}
        items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    WATCH.watch(item)
    try:
        return (yield)
    finally:
        WATCH.watch(None)


def _counted(item: pytest.Item, phase: str) -> Iterator[None]:
    begin = WATCH.cpu_seconds()
    try:
        return (yield)
    finally:
        item.user_properties.append((f"cpu {phase}", round(max(0.0, WATCH.cpu_seconds() - begin), 3)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    return (yield from _counted(item, "setup"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    result = yield from _counted(item, "call")
    limit, seconds = item.config.getoption("cpu_limit"), dict(item.user_properties)["cpu call"]
    if limit and seconds > limit:
        pytest.fail(
            f"{seconds} CPU seconds, above the limit of {limit}; mark it `slow` or make it faster", pytrace=False
        )
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    return (yield from _counted(item, "teardown"))


class Report:
    """Collects the CPU seconds of all tests, those of pytest-xdist's workers too, and lists the slowest."""

    def __init__(self, config: pytest.Config):
        self._config = config
        self._seconds: dict[str, dict[str, float]] = {}
        self._outcomes: dict[str, str] = {}
        self._began = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed" or report.when == "call":
            self._outcomes[report.nodeid] = report.outcome
        if report.when == "teardown":
            found = dict(report.user_properties)
            self._seconds[report.nodeid] = {phase: float(found.get(f"cpu {phase}", 0.0)) for phase in PHASES}

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        file, matrix = self._config.getoption("cpu_json"), self._config.getoption("matrix_result")
        if file:
            file.write_text(json.dumps(self._seconds, indent=1))
        if matrix and self._outcomes:
            matrix.write_text(self._matrix())
        ranked = sorted(self._seconds.items(), key=lambda entry: -sum(entry[1].values()))
        if self._config.getoption("durations") is None or not ranked:
            return
        total = sum(sum(phases.values()) for phases in self._seconds.values())
        terminalreporter.section(f"CPU seconds: {total:.0f} in {len(ranked)} tests, children included; the slowest")
        for name, phases in ranked[:SLOWEST]:
            split = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in phases.items() if seconds >= 0.1)
            terminalreporter.write_line(f"{sum(phases.values()):7.1f}  {name}  ({split})")

    def _matrix(self) -> str:
        """The result of a run of the matrix: when, of which commit, how long, and a row per test function."""
        rows: dict[str, Counter[str]] = {}
        for name, outcome in self._outcomes.items():
            rows.setdefault(name.partition("[")[0], Counter())[outcome] += 1
        seconds = Counter[str]()
        for name, phases in self._seconds.items():
            seconds[name.partition("[")[0]] += sum(phases.values())
        commit, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
        minutes = (time.monotonic() - self._began) / 60
        lines = [
            "# The last run of `make matrix`",
            "",
            "Written by the run itself; what the matrix is: [testing.md](testing.md).",
            "",
            f"- commit: {commit or 'not a git checkout'}{', with changes' if changed else ''}",
            f"- date: {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}",
            f"- wall time: {minutes:.1f} min on {os.cpu_count()} cores; CPU time: {seconds.total() / 60:.1f} min",
            f"- selection: `{' '.join(self._config.args)}`, `-m {self._config.getoption('markexpr') or ''}`",
            "",
            "| test | passed | failed | skipped | CPU s |",
            "|---|---|---|---|---|",
        ]
        for name, outcomes in sorted(rows.items()):
            counts = " | ".join(str(outcomes[outcome]) for outcome in ("passed", "failed", "skipped"))
            lines.append(f"| `{name}` | {counts} | {seconds[name]:.0f} |")
        return "\n".join(lines) + "\n"


def git(*words: str) -> str:
    """Return git's output, or nothing without git or a checkout."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""
