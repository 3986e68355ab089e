"""The pool against rules that hang, crash, eat memory and get killed. Machines without /proc are not covered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hostile_rules
import pytest

from owpo_megatron.types import GradingItem
from owpo_megatron.verifiers import VerifierPool
from owpo_megatron.verifiers.frames import frame, take_frames

TIMEOUT = 2.0


def _items(*responses):
    return [GradingItem(response, "", "hostile") for response in responses]


def _reasons(pool, *responses):
    return [verdict.reason for verdict in pool.score(_items(*responses))]


def _children():
    """Workers of this process that are alive (not zombies)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z" and b"verifiers.worker" in command:
            found.append(int(stat.parent.name))
    return found


@pytest.fixture(scope="module")
def pool():
    pool = VerifierPool({"hostile": hostile_rules.obey}, workers=2, timeout=TIMEOUT, memory_bytes=2**30)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ("hang", "timeout"),
        ("sleep 60", "timeout"),
        ("raise", "crashed"),
        ("exit", "crashed"),
        ("die", "crashed"),
        ("kill", "crashed"),
        ("eat", "crashed"),
        ("eat-in-one", "crashed"),
        ("print", "ok"),
    ],
)
def test_one_misbehaviour_costs_one_item(pool, order, reason):
    """Its neighbours are graded, in the order of submission, and the pool goes on with two workers."""
    start = time.monotonic()
    assert _reasons(pool, "fine", "wrong", order, "wrong", "fine") == ["ok", "wrong", reason, "wrong", "ok"]
    assert time.monotonic() - start < TIMEOUT + 10
    assert _reasons(pool, "fine", "wrong") == ["ok", "wrong"]
    assert len(_children()) == 2


def test_many_failures_in_one_call(pool):
    orders = ["die", "fine", "raise", "kill", "wrong", "exit", "fine"]
    expected = ["crashed", "ok", "crashed", "crashed", "wrong", "crashed", "ok"]
    assert _reasons(pool, *orders) == expected


def test_the_deadline_counts_from_the_start_of_grading():
    """Six items of 0.6 s on one worker take 3.6 s, more than the limit of each; none is late."""
    pool = VerifierPool({"hostile": hostile_rules.obey}, workers=1, timeout=TIMEOUT)
    verdicts = pool.score(_items(*["sleep 0.6"] * 6))
    pool.close()
    assert [v.reason for v in verdicts] == ["ok"] * 6
    assert all(0.6 <= v.seconds < TIMEOUT for v in verdicts)


def test_a_pool_may_wait_long_for_its_first_items(monkeypatch):
    """An engine starts meanwhile: workers that were ready long ago did not miss the limit of a start."""
    monkeypatch.setattr("owpo_megatron.verifiers.pool.STARTUP_TIMEOUT", 1.0)
    pool = VerifierPool({"hostile": hostile_rules.obey}, workers=1, timeout=TIMEOUT)
    started = _children()
    time.sleep(2.5)
    assert _reasons(pool, "fine") == ["ok"]
    assert _children() == started
    pool.close()


def test_verdicts_are_in_submission_order_though_later_ones_finish_first(pool):
    verdicts = pool.score(_items("sleep 0.5", "wrong", "fine", "wrong"))
    assert [v.reason for v in verdicts] == ["ok", "wrong", "ok", "wrong"]
    assert [v.correct for v in verdicts] == [True, False, True, False]


def test_workers_killed_while_idle_blame_no_item(pool):
    _reasons(pool, *["fine"] * 4)
    victims = _children()
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    while any(map(_alive, victims)):
        time.sleep(0.01)
    assert _reasons(pool, "fine", "wrong", "fine") == ["ok", "wrong", "ok"]
    assert not set(victims) & set(_children())


def test_an_interrupted_call_leaves_no_stale_verdict(pool):
    """The reply to the first call's item arrives late; it must not be taken for one of the second call's."""

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.score(_items("sleep 1", "sleep 1"))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert _reasons(pool, "wrong", "wrong", "wrong") == ["wrong"] * 3


def test_items_larger_than_the_socket_buffer(pool):
    assert _reasons(pool, "x" * 3_000_000, "wrong", "y" * 3_000_000) == ["ok", "wrong", "ok"]


def test_no_items(pool):
    assert pool.score([]) == []


def test_a_domain_without_a_rule_is_a_mistake_of_the_caller(pool):
    with pytest.raises(AssertionError, match="no rule for"):
        pool.score([GradingItem("x", "", "elsewhere")])


def test_close_ends_the_workers_and_the_pool():
    others = set(_children())
    pool = VerifierPool({"hostile": hostile_rules.obey}, workers=2, timeout=TIMEOUT)
    assert _reasons(pool, "fine") == ["ok"]
    assert len(set(_children()) - others) == 2
    pool.close()
    assert set(_children()) == others
    with pytest.raises(RuntimeError, match="closed"):
        pool.score(_items("fine"))


def test_workers_that_cannot_start_end_the_call_instead_of_hanging(monkeypatch, capfd):
    """The rule's module is importable here and not there; the worker's own traceback says so on stderr."""
    monkeypatch.setattr(hostile_rules.unimportable, "__module__", "only_here")
    module = type(sys)("only_here")
    module.unimportable = hostile_rules.unimportable
    monkeypatch.setitem(sys.modules, "only_here", module)
    others = set(_children())
    pool = VerifierPool({"hostile": hostile_rules.unimportable}, workers=1, timeout=TIMEOUT)
    with pytest.raises(RuntimeError, match="workers do not start .*exit status 1, 3 in a row"):
        pool.score(_items("fine"))
    assert set(_children()) == others
    assert "No module named 'only_here'" in capfd.readouterr().err


def test_a_script_without_a_main_guard_and_its_sudden_death(tmp_path):
    """The parent is killed while a rule hangs: the worker's own timer ends it, nothing is left behind."""
    script = tmp_path / "entry.py"
    script.write_text(
        "import sys, threading, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import hostile_rules\n"
        "from owpo_megatron.types import GradingItem\n"
        "from owpo_megatron.verifiers import VerifierPool\n"
        "pool = VerifierPool({'h': hostile_rules.obey}, workers=1, timeout=0.5)\n"
        "print(pool.score([GradingItem('pid', '', 'h')])[0].reason, flush=True)\n"
        "pool._timeout = 1000\n"
        "pool.score([GradingItem('sleep 1000', '', 'h')])\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    worker = int(parent.stdout.readline())
    time.sleep(0.5)
    assert Path(f"/proc/{worker}").exists()
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 15  # its timer: twice the time-out and five seconds
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(worker)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_frames_arrive_in_any_pieces():
    stream = frame("ready") + frame(["x" * 1000]) + frame(None)
    received, values = bytearray(), []
    for byte in stream:
        received.append(byte)
        values += take_frames(received)
    assert values == ["ready", ["x" * 1000], None] and not received
