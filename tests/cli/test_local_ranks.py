"""launch/local.py, forked.py and rank.py with real processes; the trainer itself is replaced by tiny modules."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from owpo_megatron.launch.local import run_ranks
from owpo_megatron.launch.reason import Outcome, why

pytestmark = pytest.mark.process

PROGRAM = """
    import os, signal, sys, time
    from pathlib import Path
    from owpo_megatron.errors import UserError

    rank = int(os.environ.get("RANK", "0"))
    here = Path(sys.argv[2])
    def stop(number, frame):
        (here / f"stopped_{rank}").touch()
        sys.exit(0)

    if sys.argv[1] == "fine":
        print(f"hello of rank {rank} with {sys.argv[3]}", flush=True)
        (here / f"omp_{rank}").write_text(os.environ["OMP_NUM_THREADS"])
    elif sys.argv[1] == "talk":
        for line in range(50):
            print(f"line {line}, \u03c0 \u2192 \u6570")
            time.sleep(0.01)
        (here / "talked").touch()
    elif sys.argv[1] == "mistake" and rank == int(sys.argv[3]):
        raise UserError("parallel.tp", 3, "use a divisor")
    elif sys.argv[1] == "failure" and rank == int(sys.argv[3]):
        raise RuntimeError("the disk is full")
    elif sys.argv[1] == "killed" and rank == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    elif sys.argv[1] == "stop":
        signal.signal(signal.SIGTERM, stop)
        (here / f"ready_{rank}").touch()
    elif sys.argv[1] == "deaf":
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        (here / f"ready_{rank}").touch()
    if sys.argv[1] not in ("fine", "talk"):
        time.sleep(120)
        (here / f"slept_{rank}").touch()
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "tiny_trainer.py").write_text(textwrap.dedent(PROGRAM))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return "tiny_trainer"


def test_one_rank_runs_with_its_arguments(program: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = run_ranks(["fine", str(tmp_path), "x=1"], 1, tmp_path / "logs", program)
    assert outcome == Outcome(0)
    assert "hello of rank 0 with x=1" in capfd.readouterr().out
    assert (tmp_path / "omp_0").read_text() == "1"


@pytest.mark.ranks
def test_rank_0_has_the_terminal_and_the_others_a_log(
    program: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = run_ranks(["fine", str(tmp_path), "y"], 2, tmp_path / "logs", program)
    assert outcome == Outcome(0)
    assert capfd.readouterr().out.strip() == "hello of rank 0 with y"
    assert (tmp_path / "logs" / "rank_1.log").read_text().strip() == "hello of rank 1 with y"


@pytest.mark.parametrize(
    ("kind", "code", "reason"),
    [
        ("mistake", 2, "parallel.tp = 3: use a divisor"),
        ("failure", 1, "rank 0: RuntimeError: the disk is full"),
        ("killed", 1, "rank 0 was ended by SIGKILL; the machine may have run out of memory"),
    ],
)
def test_reason_of_a_single_rank(program: str, tmp_path: Path, kind: str, code: int, reason: str) -> None:
    outcome = run_ranks([kind, str(tmp_path), "0"], 1, tmp_path / "logs", program)
    assert (outcome.code, outcome.reason) == (code, reason)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("kind", "code", "reason"),
    [
        ("mistake", 2, "parallel.tp = 3: use a divisor"),
        ("killed", 1, "rank 1 was ended by SIGKILL; the machine may have run out of memory"),
    ],
)
def test_a_failing_rank_takes_the_others_down(
    program: str,
    tmp_path: Path,
    kind: str,
    code: int,
    reason: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other rank sleeps, and does not get to the end of it; one that hangs in a collective is not covered. Nothing
    is left in the folder for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    outcome = run_ranks([kind, str(tmp_path), "1"], 2, tmp_path / "logs", program)
    assert (outcome.code, outcome.reason) == (code, reason)
    assert not list(tmp_path.glob("slept_*")) and not list((tmp_path / "tmp").iterdir())
    assert "Traceback" not in capfd.readouterr().err


def test_errors_of_an_earlier_start_are_forgotten(program: str, tmp_path: Path) -> None:
    run_ranks(["mistake", str(tmp_path), "0"], 1, tmp_path / "logs", program)
    outcome = run_ranks(["failure", str(tmp_path), "0"], 1, tmp_path / "logs", program)
    assert outcome.code == 1
    assert outcome.log is not None and "Traceback" in outcome.log.read_text()


def test_a_run_does_not_end_with_the_reader_of_its_output(program: str, tmp_path: Path) -> None:
    """`| head -1`, in an encoding that lacks what is printed."""
    code = f"""
        import sys
        from pathlib import Path
        from owpo_megatron.launch.local import run_ranks
        sys.exit(run_ranks(["talk", {str(tmp_path)!r}], 1, Path({str(tmp_path / "logs")!r}), {program!r}).code)
    """
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    launcher = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, env=env)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == b"line 0, ? ? ?\n"
    launcher.stdout.close()
    assert launcher.wait(timeout=60) == 0 and (tmp_path / "talked").exists()


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_reaches_every_rank_and_nothing_stays(program: str, tmp_path: Path, ranks: int) -> None:
    code = f"""
        import sys
        from pathlib import Path
        from owpo_megatron.launch.local import run_ranks
        sys.exit(run_ranks(["stop", {str(tmp_path)!r}], {ranks}, Path({str(tmp_path / "logs")!r}), {program!r}).code)
    """
    launcher = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    ready = [tmp_path / f"ready_{rank}" for rank in range(ranks)]
    while not all(file.exists() for file in ready):
        assert launcher.poll() is None
        time.sleep(0.1)
    family = psutil.Process(launcher.pid).children(recursive=True)
    named = [one.name() for one in family]
    assert {f"owpo-rank-{rank}" for rank in range(ranks)} <= set(named), (
        "`ps -o comm` does not show which rank is which"
    )
    heard = [one.laddr.ip for process in family for one in process.net_connections() if one.status == "LISTEN"]
    assert set(heard) == (set() if ranks == 1 else {"127.0.0.1"}), "the ranks' store listens to other machines"
    os.kill(launcher.pid, signal.SIGTERM)
    output, _ = launcher.communicate(timeout=40)
    assert launcher.returncode == 0
    assert "stopping" in output
    assert all((tmp_path / f"stopped_{rank}").exists() for rank in range(ranks))
    psutil.wait_procs(family, timeout=5)
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_a_second_signal_ends_a_rank_in_the_middle_of_its_step(program: str, tmp_path: Path) -> None:
    """A rank only notes a signal, and looks at the end of a step, which may be hours away."""
    code = f"""
        import sys
        from pathlib import Path
        from owpo_megatron.launch import local
        local.SHUTDOWN_SECONDS = 0.5
        outcome = local.run_ranks(["deaf", {str(tmp_path)!r}], 1, Path({str(tmp_path / "logs")!r}), {program!r})
        sys.exit(7 if outcome.stopped and outcome.code == 1 else 0)
    """
    launcher = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "ready_0").exists():
        assert launcher.poll() is None
        time.sleep(0.1)
    assert launcher.stdout is not None
    for said in ("stopping: a step under way", "stopping within 0.5 s"):
        os.kill(launcher.pid, signal.SIGTERM)
        assert said in launcher.stdout.readline()
    assert launcher.wait(timeout=60) == 7 and not (tmp_path / "slept_0").exists()


@pytest.mark.parametrize(("code", "reason"), [(-9, "the launcher was ended by SIGKILL"), (1, "ended with exit code 1")])
def test_a_launcher_that_is_killed_is_named(tmp_path: Path, code: int, reason: str) -> None:
    (tmp_path / "launcher.log").write_text("")
    assert reason in why(code, 2, tmp_path).reason


@pytest.mark.ranks
def test_an_import_that_starts_a_thread_makes_it_torchrun(program: str, tmp_path: Path) -> None:
    """A fork would lose the thread."""
    (tmp_path / "threaded.py").write_text(
        "import threading, time; threading.Thread(target=time.sleep, args=[60]).start()"
    )
    command = [sys.executable, "-m", "owpo_megatron.launch.forked", "2", "threaded", str(tmp_path / "logs"), program]
    done = subprocess.run([*command, "fine", str(tmp_path), "z"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "hello of rank 0 with z", done.stderr
    assert "the imports started 1 threads; torchrun starts the ranks" in done.stderr
    assert (tmp_path / "logs" / "rank_1.log").read_text().strip() == "hello of rank 1 with z"


@pytest.mark.parametrize("killed", ["second signal", "launcher"])
def test_ranks_that_do_not_listen_are_killed(tmp_path: Path, killed: str) -> None:
    """A second signal gives them SHUTDOWN_SECONDS (here: one). Without the launcher they get SIGTERM from the kernel,
    which these ignore only once they run."""
    code = f"""
        import os, signal, sys, time
        from pathlib import Path
        from owpo_megatron.launch import forked, rank
        forked.SHUTDOWN_SECONDS = 1
        pids = {{}}
        for index in range(2):
            pid = os.fork()
            if not pid:
                rank.end_with_parent()
                if {killed == "second signal"}:
                    for number in (signal.SIGINT, signal.SIGTERM):
                        signal.signal(number, signal.SIG_IGN)
                Path({str(tmp_path)!r}, f"pid_{{index}}").write_text(str(os.getpid()))
                time.sleep(120)
            pids[pid] = index
        family = forked._Family(pids)
        Path({str(tmp_path)!r}, "watches").touch()
        os._exit(family.watch())
    """
    launcher = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.PIPE, text=True)
    files = [tmp_path / "pid_0", tmp_path / "pid_1", tmp_path / "watches"]
    while not all(file.exists() for file in files) or not all(file.read_text() for file in files[:2]):
        assert launcher.poll() is None
        time.sleep(0.05)
    ranks = [psutil.Process(int(file.read_text())) for file in files[:2]]
    if killed == "launcher":
        launcher.kill()
    else:
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.3)  # two signals of a kind that arrive together are one
        assert launcher.poll() is None and all(one.is_running() for one in ranks)
        launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=60)
    gone, alive = psutil.wait_procs(ranks, timeout=20)
    assert not alive and launcher.returncode == (-signal.SIGKILL if killed == "launcher" else 1)
    assert killed == "launcher" or said.count("exitcode  : -9") == 2
