"""The `owpo` command where its surroundings are odd: closed streams, a folder that is gone, limits, other users."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import yaml

from owpo_megatron.cli import main
from owpo_megatron.cli.runs import state_of
from owpo_megatron.errors import EngineError, one_line
from owpo_megatron.run.files import take_lock

NOBODY = 65534


def shell(line: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line for bash in which $OWPO is the command."""
    env = os.environ | {"OWPO": f"{sys.executable} -m owpo_megatron.cli.main"} | environment
    return subprocess.run(["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True)


def make_run(root: Path) -> Path:
    run = root / "mine"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"name": "mine", "optimizer": {"steps": 8}}))
    (run / "metrics.jsonl").write_text('{"step": 1, "reward_mean": 0.5, "seconds": {"total": 1.0}}\n')
    return run


@pytest.mark.process
def test_closed_streams(tmp_path: Path) -> None:
    """Output goes nowhere, and into no file that the command opens."""
    make_run(tmp_path)
    done = shell("$OWPO runs . --json found.json <&- >&- 2>&-", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert '"name": "mine"' in (tmp_path / "found.json").read_text()
    assert shell("$OWPO runs nowhere >&-", tmp_path).stderr.startswith("error: FOLDER = nowhere")


@pytest.mark.process
def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    done = shell("mkdir here; cd here; rmdir ../here; $OWPO runs", tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: working folder = (removed): cd to a folder that exists\n")


@pytest.mark.process
@pytest.mark.parametrize("module", ["typer", "owpo_megatron.cli.runs"])
def test_an_interrupt_at_the_start(module: str, tmp_path: Path) -> None:
    """Ctrl-C while the first module is imported, or the last: no traceback. Python's own start is not covered."""
    hook = f"""
        import os, signal, sys
        class Finder:
            def find_spec(name, path=None, target=None):
                if name == {module!r}:
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Finder)
    """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(hook))
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = shell("exec $OWPO runs", tmp_path, PYTHONPATH=paths)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.process
def test_the_encoding_of_the_locale_does_not_matter(tmp_path: Path) -> None:
    text = "name: läuf\nmodel: {path: π}\ndata: {source: 'task:cipher'}\n"
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    ascii_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = shell("$OWPO config show -c run.yaml", tmp_path, **ascii_locale)
    assert done.returncode == 0 and "name: läuf\n" in done.stdout and "path: π\n" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files: raise the limit of open files"),
        (OSError(errno.EFBIG, "File too large", "a/b"), "a/b: File too large: raise the limit of file sizes"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "Resource .*: raise the limit"),
        (RuntimeError("[enforce fail at tcp/device.cc] rv != -1. Too many open files"), "Too many open files: raise"),
        (RuntimeError("can't start new thread"), "can't start new thread: raise the limit of processes"),
        (MemoryError(), "out of memory; lower optimizer.tokens_per_microbatch"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0"), "out of memory: CUDA out of memory"),
        (OSError(errno.ECONNREFUSED, "Connection refused"), "Connection refused$"),
        (EngineError("engine 0 is gone: CUDA out of memory"), "engine 0 is gone"),
    ],
)
def test_a_limit_of_the_machine_is_named(
    error: Exception, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line of a rank's error file, and of the command itself where it is the system's error."""
    assert re.match(line, one_line(error)), one_line(error)
    if not isinstance(error, OSError) or error.filename is not None:
        return

    def fails(prog_name: str) -> None:
        raise error

    monkeypatch.setattr(main, "_make_app", lambda names: fails)
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 1 and re.match(f"failed: {line}", capsys.readouterr().err)


@pytest.mark.process
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root, to be another user")
def test_the_list_shows_runs_of_other_users() -> None:
    """A lock that only its owner may open, and a run folder that nobody else may read."""
    with tempfile.TemporaryDirectory() as name:  # pytest's own folder is closed to other users
        place = Path(name)
        place.chmod(0o755)
        held = take_lock(make_run(place / "a") / ".lock")
        make_run(place / "b").chmod(0o700)
        line = f"setpriv --reuid {NOBODY} --clear-groups $OWPO runs a b"
        done = shell(line, place)
        assert done.returncode == 0 and "running" in done.stdout, done.stdout + done.stderr
        os.close(held or 0)
        assert "stopped" in shell(line, place).stdout


def test_what_is_no_line_of_a_step_hides_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": "two"}\n{"step": null}\n[1]\n{"step": 2, "seconds": {"total": 1.0}}\n{"step": 3, "\xff')
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = state_of(run)
    assert (found.step, found.status) == (2, "running")
