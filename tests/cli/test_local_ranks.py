"""launch/local.py and launch/rank.py with real processes; the trainer itself is replaced by tiny modules."""

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
    """The other rank sleeps, and does not get to the end of it; one that hangs in a collective is not covered. torchrun
    leaves no folder behind."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    outcome = run_ranks([kind, str(tmp_path), "1"], 2, tmp_path / "logs", program)
    assert (outcome.code, outcome.reason) == (code, reason)
    assert not list(tmp_path.glob("slept_*")) and not list((tmp_path / "tmp").glob("torchelastic*"))
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
        local._SHUTDOWN_SECONDS = 0.5
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


@pytest.mark.parametrize(("code", "reason"), [(-9, "torchrun was ended by SIGKILL"), (1, "ended with exit code 1")])
def test_a_torchrun_that_is_killed_is_named(tmp_path: Path, code: int, reason: str) -> None:
    (tmp_path / "torchrun.log").write_text("")
    assert reason in why(code, 2, tmp_path).reason
