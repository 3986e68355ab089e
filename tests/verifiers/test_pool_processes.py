"""Processes around a rule: deadlines by the clock, children that outlive an item, replies that are not its own.

The wall times have room for a busy machine: the pool promises twice the limit where no core is free.
"""

from __future__ import annotations

import os
import signal
import time

import hostile_rules
import psutil
import pytest

from owpo_megatron.types import GradingItem
from owpo_megatron.verifiers import VerifierPool
from owpo_megatron.verifiers.protocol import frame, judged, take_frames

pytestmark = pytest.mark.process

TIMEOUT = 1.0
BUSY = 2.5  # seconds that a machine with other work may add


@pytest.fixture(scope="module")
def pool():
    pool = VerifierPool({"hostile": hostile_rules.obey}, workers=2, timeout=TIMEOUT, memory_bytes=2**30)
    yield pool
    pool.close()


def grade(pool, *responses):
    return pool.score([GradingItem(response, "", "hostile") for response in responses])


def reasons(pool, *responses):
    return [verdict.reason for verdict in grade(pool, *responses)]


def workers():
    """Workers of all pools of this process: children of guards."""
    guards = [child for child in psutil.Process().children() if "owpo_megatron.verifiers.guard" in child.cmdline()]
    return [worker for guard in guards for worker in guard.children()]


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("order", ["hang", "spin", "sleep 60", "stop"])
def test_a_hang_costs_its_limit(pool, order):
    """Hangs in C code that holds the interpreter, in Python, asleep, stopped by a signal."""
    (verdict,) = grade(pool, order)
    assert verdict.reason == "timeout" and "no verdict within" in verdict.detail
    assert TIMEOUT <= verdict.seconds < 2 * TIMEOUT + BUSY
    assert verdict.seconds < TIMEOUT + 0.5 + BUSY or order in ("hang", "spin")


def test_many_hangs_cost_their_share(pool):
    """Six hangs on two workers: three limits, each with half a second to spare, and not one start of a process more."""
    reasons(pool, "fine", "fine")
    began = time.monotonic()
    assert reasons(pool, *["sleep 60"] * 6) == ["timeout"] * 6
    assert time.monotonic() - began < 6 / 2 * (TIMEOUT + 0.5) + BUSY


@pytest.mark.parametrize("order", ["child", "daemon", "fork-and-stay", "thread-of-children"])
@pytest.mark.parametrize("then", ["", " hang"])
def test_children_of_a_rule_die_with_it(pool, order, then, tmp_path):
    """Whether the rule returns or is killed at its deadline; in the same session or another."""
    file = tmp_path / "pids"
    (verdict,) = grade(pool, f"{order} {file}{then}")
    assert verdict.reason == ("timeout" if then else "ok")
    assert reasons(pool, "wrong", "wrong", "wrong", "wrong") == ["wrong"] * 4
    started = [int(pid) for pid in file.read_text().split()]
    assert started
    deadline = time.monotonic() + 5
    while any(map(alive, started)):
        assert time.monotonic() < deadline, "a child outlived its item"
        time.sleep(0.02)


def test_children_of_a_rule_that_dies_do_not_outlive_it(pool, tmp_path):
    assert reasons(pool, f"daemon {tmp_path / 'pids'} die") == ["crashed"]
    (started,) = (int(pid) for pid in (tmp_path / "pids").read_text().split())
    deadline = time.monotonic() + 5
    while alive(started):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_children_end_with_the_pool(tmp_path):
    pool = VerifierPool({"hostile": hostile_rules.obey}, workers=1, timeout=60)
    grading = pool.submit([GradingItem(f"daemon {tmp_path / 'pids'} hang", "", "hostile")])
    while not (tmp_path / "pids").exists() or not (tmp_path / "pids").read_text():
        time.sleep(0.02)
    (started,) = (int(pid) for pid in (tmp_path / "pids").read_text().split())
    assert alive(started) and not grading.done()
    pool.close()
    assert not alive(started)


def test_a_rule_that_forks_and_returns_twice(pool):
    """The child's answer must not become the next item's: a wrong answer was once `ok`."""
    for _ in range(5):
        assert reasons(pool, "fork", "wrong", "fork", "wrong", "wrong") == ["ok", "wrong", "ok", "wrong", "wrong"]


def test_a_child_that_answers_for_the_items_after_it(pool):
    """Leaves a process that writes `ok` for every number, with the nonce of its own item, into the worker's socket."""
    for _ in range(3):
        assert reasons(pool, "usurp", *["wrong"] * 6)[1:] == ["wrong"] * 6


def test_a_child_that_takes_the_next_item_from_the_socket(pool):
    for _ in range(3):
        assert reasons(pool, "thief", *["wrong"] * 6)[1:] == ["wrong"] * 6


@pytest.mark.parametrize("order", ["babble", "oversize", "close"])
def test_a_worker_that_breaks_its_socket(pool, order):
    """Bytes that are no frame, a length of 4 GB, all descriptors closed: that item has crashed, its neighbours not."""
    assert reasons(pool, "wrong", order, "wrong", "fine") == ["wrong", "crashed", "wrong", "ok"]


def test_what_a_rule_prints_goes_nowhere(pool, capfd):
    """Into neither stream of the run; the last line of a crash is in its verdict."""
    assert reasons(pool, "print") == ["ok"]
    (verdict,) = grade(pool, "complain")
    assert verdict.reason == "crashed" and "SIGSEGV" in verdict.detail and verdict.detail.endswith("last words")
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_a_worker_killed_from_outside_costs_one_item(pool):
    grading = pool.submit([GradingItem("sleep 0.6", "", "hostile")])
    time.sleep(0.2)
    for worker in workers():
        os.kill(worker.pid, signal.SIGKILL)
    (verdict,) = grading.result()
    assert verdict.reason == "crashed" and "SIGKILL" in verdict.detail
    assert reasons(pool, "fine", "wrong") == ["ok", "wrong"]


def test_rules_are_imported_once(pool):
    """A replaced worker is a fork of its guard: it costs milliseconds, also with rules that take long to import."""
    reasons(pool, "fine", "fine")
    began = time.monotonic()
    assert reasons(pool, *["die", "exit"] * 5) == ["crashed"] * 10
    assert time.monotonic() - began < 1 + BUSY


def test_a_rule_whose_module_starts_threads(tmp_path, monkeypatch):
    """A fork would lose the thread: each worker imports the module itself, and still each is replaced."""
    (tmp_path / "threaded_rule.py").write_text(
        "import threading, queue\n"
        "asked, answered = queue.Queue(), queue.Queue()\n"
        "def work():\n while True: answered.put(asked.get() == 'right')\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "def grade(response, answer):\n"
        " if response == 'die': import os; os._exit(1)\n"
        " asked.put(response); return answered.get()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    from owpo_megatron.verifiers.rules import find_rule

    pool = VerifierPool({"": find_rule("python:threaded_rule:grade")}, workers=1, timeout=20)
    items = [GradingItem(response, "", "") for response in ("right", "left", "die", "right", "left")]
    assert [verdict.reason for verdict in pool.score(items)] == ["ok", "wrong", "crashed", "ok", "wrong"]
    pool.close()


@pytest.mark.parametrize(
    "said", [None, 7, "yes", ["ok"], {"reason": "ok"}, {"reason": "no", "score": 1, "parts": None}]
)
def test_what_no_rule_may_say(said):
    with pytest.raises(ValueError, match="a rule returned"):
        judged(said)


def test_a_frame_that_is_too_long_is_refused_before_it_is_there():
    with pytest.raises(ValueError, match="a frame of 11 bytes"):
        take_frames(bytearray(frame(b"x" * 11)[:5]), longest=10)
