"""Faults of engines: what they answer, when they answer, and whether they answer at all.

The engine is a process with SGLang's endpoints that answers from recorded rollouts (stand_in.py); fleet, client, weight
sync and trainer are the run's own. A fault that happens once must leave no trace in the numbers.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import stand_in
from ended import Wrong
from registry import fault
from trial import Trial

ANSWERS = "an engine's answer is checked before it is used"
SILENCE = "an engine that is lost is restarted and draws the same samples again"


class StandIn:
    """A process that takes the place of an engine."""

    def __init__(self, rollouts: Path, *arguments: str):
        command = [sys.executable, stand_in.__file__, str(rollouts / "step_000001.jsonl"), *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    @property
    def fields(self) -> list[str]:
        """Overrides of a run that uses it."""
        return ["rollout.replay=null", f'engine.urls=["http://127.0.0.1:{self.port}"]', "engine.startup_timeout=20"]

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)


@contextmanager
def engine(trial: Trial, *arguments: str) -> Iterator[StandIn]:
    one = StandIn(trial.ground.rollouts, *arguments)
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()


def _busy(trial: Trial, name: str) -> None:
    """A busy engine is asked again, and not restarted."""
    with engine(trial, "--fault", name, "--times", str(trial.rng.randint(1, 3))) as one:
        ended = trial.train(*one.fields, "engine.request_timeout=30").done()
    if "is lost" in ended.text:
        raise Wrong(f"a busy engine counts as lost:\n{ended.text}")
    trial.same_as_without()


def _once(trial: Trial, name: str) -> None:
    """A request that goes wrong once: the run restarts the engine and ends with the numbers of one without a fault."""
    with engine(trial, "--fault", name, "--after", str(trial.rng.randrange(4))) as one:
        ended = trial.train(*one.fields, "engine.request_timeout=3").done()
    if "engine 0 is lost, restart 1" not in ended.text:
        raise Wrong(f"the wrong answer went unnoticed:\n{ended.text}")
    trial.same_as_without()


def _always(trial: Trial, name: str, pattern: str) -> None:
    """Every request goes wrong: the run ends with one line that names the engine, its URL and the first bytes."""
    with engine(trial, "--fault", name, "--times", "-1", "--after", "2") as one:
        ended = trial.train(*one.fields, "engine.request_timeout=2", "engine.max_restarts=2")
        ended.refused(rf"engine 0 .*max_restarts.*http://127.0.0.1:{one.port}.*{pattern}")
    saved = max(trial.saved(), default=0)
    if saved:
        trial.goes_on(at_least=saved)


_SHOWN = {
    "nan": "log-prob nan",
    "minus infinity": "log-prob -inf",
    "positive": "log-prob 5",
    "null": "no sample",
    "lengths": "do not belong together",
    "too many tokens": "tokens of 8 allowed",
    "no tokens": "no tokens",
    "id too large": "token id 999999",
    "id negative": "token id -5",
    "abort": "finish reason 'abort'",
    "stale": r"though \d+ were pushed",
    "version foo": r"though \d+ were pushed",
    "one missing": "answers to",
    "another object": r"\{'foo': 1\}",
    "numbers": r"answers to \d+ requests|no sample: 1",
    "html": "<html><body>504",
    "500": "failed with 500: no",
    "cut": "not reachable",
    "closed": "not reachable",
    "slow": "did not answer within 2 s",
}


def _register(name: str) -> None:
    promise = ANSWERS if name in stand_in.WRONG or name == "html" else SILENCE
    quick = name in ("nan", "stale")

    def once(trial: Trial) -> None:
        _once(trial, name)

    def always(trial: Trial) -> None:
        _always(trial, name, _SHOWN[name])

    fault(f"engine, once: {name}", promise, by=("command", "ranks"), quick=quick)(once)
    fault(f"engine, always: {name}", promise, by=("ranks",))(always)


for _name in _SHOWN:
    _register(_name)


@fault("engine, a while: 429", promise="a busy engine is asked again", by=("ranks",))
def busy(trial: Trial) -> None:
    _busy(trial, "429")


@fault("engine, a while: 503", promise="a busy engine is asked again", by=("ranks",))
def unavailable(trial: Trial) -> None:
    _busy(trial, "503")


@fault("engine, stopped for a while", promise=SILENCE, by=("command", "ranks"))
def stopped_for_a_while(trial: Trial) -> None:
    """SIGSTOP in the middle of the run; SIGCONT after its requests have timed out."""
    with engine(trial) as one:
        run = trial.start(*one.fields, "engine.request_timeout=2")
        run.wait_until(trial.reached(trial.rng.randint(1, 2)), "a step")
        one.signal(signal.SIGSTOP)
        waker = threading.Timer(6.0, one.signal, [signal.SIGCONT])
        waker.start()
        run.wait().done()
        waker.join()
    trial.same_as_without()


@fault("engine, killed", promise=SILENCE, by=("command", "ranks"))
def killed(trial: Trial) -> None:
    """SIGKILL; somebody starts it again at the same address, where it has the initial weights."""
    with engine(trial) as one:
        run = trial.start(*one.fields, "engine.request_timeout=2")
        run.wait_until(trial.reached(trial.rng.randint(1, 2)), "a step")
        one.signal(signal.SIGKILL)
        one.process.wait()
        time.sleep(trial.rng.uniform(0.0, 1.0))
        with engine(trial, "--port", str(one.port)):
            run.wait().done(r"engine 0 is lost, restart 1 of")
    trial.same_as_without()


@fault("engine, log-probs of other weights", promise="a mismatch above the bound ends the run")
def mismatch(trial: Trial) -> None:
    """Log-probs three nats off, for the whole run: no single answer is impossible, all together are."""
    with engine(trial, "--fault", "off by three nats", "--times", "-1") as one:
        ended = trial.train(*one.fields, "optimizer.steps=8")
    ended.refused(r"mismatch .*above .*checks\.mismatch").told(r"(?m)^ .*mismatch")


@fault("engine, no such address", promise="bad input is refused in one line", by=("command", "ranks"))
def no_such_address(trial: Trial) -> None:
    ended = trial.train("rollout.replay=null", 'engine.urls=["http://127.0.0.1:9"]')
    ended.refused("engine.urls = http://127.0.0.1:9: no SGLang server answers", code=2)


@fault("engine, its port is taken", promise="bad input is refused in one line", by=("command", "ranks"))
def port_taken(trial: Trial) -> None:
    with engine(trial) as one:
        ended = trial.train("rollout.replay=null", f"engine.port={one.port}")
    if re.search("no SGLang|has no sglang|engine.python", ended.text):
        return  # SGLang's environment is not there: refused for that
    ended.refused(f"engine.port = {one.port}: .*in use", code=2)
