"""The pool against rules that hang, crash, eat memory and get killed. Machines without /proc are not covered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import hostile_rules
import psutil
import pytest

from owpo_megatron.types import GradingItem
from owpo_megatron.verifiers import VerifierPool
from owpo_megatron.verifiers.protocol import frame, take_frames

pytestmark = pytest.mark.process

TIMEOUT = 2.0


def _items(*responses):
    return [GradingItem(response, "", "hostile") for response in responses]


def _reasons(pool, *responses):
    return [verdict.reason for verdict in pool.score(_items(*responses))]


def _children():
    """Guards of this process that are alive (not zombies)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = (stat.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == os.getpid() and fields[0] != "Z" and b"verifiers.guard" in command:
            found.append(int(stat.parent.name))
    return found


@pytest.fixture(scope="module")
def pool():
    pool = VerifierPool({"hostile": hostile_rules.obey}, workers=2, timeout=TIMEOUT, memory_bytes=2**30)
    yield pool
    pool.close()


@pytest.mark.slow
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
    assert _reasons(pool, "fine", "wrong", order, "wrong", "fine") == ["ok", "wrong", reason, "wrong", "ok"]
    assert _reasons(pool, "fine", "wrong") == ["ok", "wrong"]
    assert len(_children()) == 2


def test_many_failures_in_one_call(pool):
    orders = ["die", "fine", "raise", "kill", "wrong", "exit", "fine"]
    expected = ["crashed", "ok", "crashed", "crashed", "wrong", "crashed", "ok"]
    assert _reasons(pool, *orders) == expected


def test_the_deadline_counts_from_the_start_of_grading():
    """Six items of 0.6 s on one worker take at least 3.6 s, more than the limit of each; none is late."""
    pool = VerifierPool({"hostile": hostile_rules.obey}, workers=1, timeout=TIMEOUT)
    verdicts = pool.score(_items(*["sleep 0.6"] * 6))
    pool.close()
    assert [v.reason for v in verdicts] == ["ok"] * 6
    assert all(v.seconds >= 0.6 for v in verdicts)


def test_a_pool_may_wait_long_for_its_first_items(monkeypatch):
    """An engine starts meanwhile: workers that were ready long ago did not miss the limit of a start."""
    monkeypatch.setattr("owpo_megatron.verifiers.dispatcher.STARTUP_TIMEOUT", 4.0)
    pool = VerifierPool({"hostile": hostile_rules.obey}, workers=1, timeout=TIMEOUT)
    started = set(_children())
    assert _reasons(pool, "fine") == ["ok"]
    time.sleep(4.5)
    assert _reasons(pool, "fine") == ["ok"]
    assert started <= set(_children())
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


def test_grading_goes_on_while_the_caller_does(pool):
    """Two batches are under way at once; each keeps its order, and the first is not held up by the second."""
    first = pool.submit(_items("sleep 0.4", "wrong"))
    second = pool.submit(_items("wrong", "sleep 0.2", "fine"))
    assert not first.done() and not second.done()
    with pytest.raises(TimeoutError, match="2 of 2|1 of 2"):
        first.result(timeout=0.01)
    assert [v.reason for v in first.result()] == ["ok", "wrong"]
    assert [v.reason for v in second.result()] == ["wrong", "ok", "ok"]
    assert second.finished == 3 and second.wait(0)


def test_batches_of_several_threads(pool):
    results = {}

    def grade(name, orders):
        results[name] = _reasons(pool, *orders)

    orders = {n: ["fine", "wrong", "fine", "raise"][n % 4 :] for n in range(8)}
    threads = [threading.Thread(target=grade, args=item) for item in orders.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {"fine": "ok", "wrong": "wrong", "raise": "crashed"}
    assert results == {n: [names[order] for order in batch] for n, batch in orders.items()}


def test_submit_blocks_when_too_much_is_under_way():
    """Four slow items, two may be pending: the third waits for the first verdict."""
    pool = VerifierPool({"hostile": hostile_rules.obey}, workers=1, timeout=TIMEOUT, max_pending=2)
    _reasons(pool, "fine")
    grading = pool.submit(_items(*["sleep 0.5"] * 4))
    assert grading.finished >= 2
    assert [v.reason for v in grading.result()] == ["ok"] * 4
    pool.close()


def test_a_hostile_item_does_not_delay_the_others():
    """One of two workers hangs until the deadline; the other 40 items do not wait for it."""
    pool = VerifierPool({"hostile": hostile_rules.obey}, workers=2, timeout=6.0)
    _reasons(pool, *["sleep 0.05"] * 4)
    hanging = pool.submit(_items("sleep 60"))
    assert _reasons(pool, *["sleep 0.02"] * 40) == ["ok"] * 40
    assert not hanging.done()
    assert hanging.result()[0].reason == "timeout"
    pool.close()


def test_a_cancelled_batch_is_not_graded():
    pool = VerifierPool({"hostile": hostile_rules.obey}, workers=1, timeout=TIMEOUT)
    _reasons(pool, "fine")
    grading = pool.submit(_items(*["sleep 0.3"] * 20))
    grading.cancel()
    assert _reasons(pool, "wrong") == ["wrong"]
    assert grading.finished < 20, "an item that came after them was graded after them"
    pool.close()


def test_closing_fails_what_is_under_way():
    pool = VerifierPool({"hostile": hostile_rules.obey}, workers=1, timeout=60)
    _reasons(pool, "fine")
    grading = pool.submit(_items("sleep 50", "fine"))
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        grading.result(timeout=5)


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
    """The rule's module is importable here and not there; the worker's own traceback shows it on stderr."""
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
    """The parent is killed while a rule hangs: guard and worker notice, nothing is left behind."""
    script = tmp_path / "entry.py"
    script.write_text(
        "import sys, threading, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import hostile_rules\n"
        "from owpo_megatron.types import GradingItem\n"
        "from owpo_megatron.verifiers import VerifierPool\n"
        "pool = VerifierPool({'h': hostile_rules.obey}, workers=1, timeout=0.5)\n"
        "print(pool.score([GradingItem('fine', '', 'h')])[0].reason, flush=True)\n"
        "pool._dispatcher._timeout = 1000\n"
        "pool.score([GradingItem('sleep 1000', '', 'h')])\n"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout.readline() == "ok\n"
    family = [process.pid for process in psutil.Process(parent.pid).children(recursive=True)]
    assert len(family) == 2  # the guard and its worker
    time.sleep(0.5)
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 15
    while any(map(_alive, family)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_alive, family))


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_frames_arrive_in_any_pieces():
    stream = frame(b"ready") + frame(b"x" * 1000) + frame(b"")
    received, values = bytearray(), []
    for byte in stream:
        received.append(byte)
        values += take_frames(received)
    assert values == [b"ready", b"x" * 1000, b""] and not received
