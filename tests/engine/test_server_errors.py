"""Starting and stopping servers when things go wrong: every message names the field and comes within seconds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine import Server, start_fleet, supervise
from owpo_megatron.engine import server as server_module
from owpo_megatron.errors import EngineError, UserError

SNAPSHOTS = Path("/dev/shm")

pytestmark = pytest.mark.process


def test_missing_interpreter(tiny_model: Path, tmp_path: Path) -> None:
    config = EngineConfig(python=tmp_path / "nowhere" / "python", device="cpu")
    with pytest.raises(UserError, match="engine.python = .*nowhere.*no such interpreter"):
        start_fleet(config, tiny_model, "float32", {}, tmp_path)


def test_interpreter_without_sglang(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="engine.python = .*has no sglang"):
        start_fleet(EngineConfig(python=Path(sys.executable), device="cpu"), tiny_model, "float32", {}, tmp_path)


def test_missing_model(engine_python: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.path = .*no HF checkpoint"):
        start_fleet(EngineConfig(python=engine_python, device="cpu"), tmp_path, "float32", {}, tmp_path)


def test_port_in_use(engine_python: Path, tiny_model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"engine.port = {port}: in use"):
            start_fleet(EngineConfig(python=engine_python, port=port), tiny_model, "float32", {}, tmp_path)


def test_url_without_a_server(tiny_model: Path, tmp_path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match="engine.urls = .*no SGLang server answers"):
            start_fleet(EngineConfig(urls=[url]), tiny_model, "float32", {}, tmp_path)


@pytest.mark.server
def test_server_that_is_not_ready_in_time(engine_python: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The error has the end of the log, and nothing is left running."""
    config = EngineConfig(python=engine_python, device="cpu", startup_timeout=1.0)
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(EngineError, match=r"(?s)engine.startup_timeout = 1 s.*engine_0.log:\n.*launch_server"):
        start_fleet(config, tiny_model, "float32", {}, tmp_path)
    assert not set(psutil.Process().children(recursive=True)) - before


@pytest.mark.server
def test_an_argument_that_sglang_does_not_take(engine_python: Path, tiny_model: Path, tmp_path: Path) -> None:
    server = Server(
        EngineConfig(python=engine_python, device="cpu"), tiny_model, "float32", {"no_such_thing": 1}, tmp_path / "log"
    )
    with pytest.raises(UserError, match="sglang = {'no_such_thing': 1}: .*unrecognized arguments: --no-such-thing 1"):
        server.start()
    assert not server.is_running()


@pytest.mark.server
def test_port_that_is_taken_during_the_start_is_given_up(
    engine_python: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger listens on the first port chosen and answers nonsense there; the second is used."""
    stranger = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert stranger.stdout is not None
        taken = int(stranger.stdout.readline().split(" port ")[1].split()[0])
        ports = iter([taken, server_module._free_port("127.0.0.1")])
        monkeypatch.setattr(server_module, "_free_port", lambda host: next(ports))
        config = EngineConfig(python=engine_python, device="cpu")
        before = set(SNAPSHOTS.glob("sglang_loads_*"))
        with start_fleet(config, tiny_model, "float32", {}, tmp_path, with_keys=True) as fleet:
            assert fleet.weight_versions() == [0]
            assert not fleet.clients[0].url.endswith(f":{taken}")
            own = (set(SNAPSHOTS.glob("sglang_loads_*")) - before) & mapped_by_children()  # others start engines, too
            with pytest.raises(urllib.error.HTTPError, match="401"):  # anybody else
                change = json.dumps({"new_version": "7", "abort_all_requests": False}).encode()
                headers = {"Content-Type": "application/json"}
                url = f"{fleet.clients[0].url}/update_weight_version"
                urllib.request.urlopen(urllib.request.Request(url, change, headers), timeout=20)
            assert fleet.weight_versions() == [0]
        assert own and not own & set(SNAPSHOTS.iterdir()), "shared memory is left behind"
    finally:
        stranger.kill()
        stranger.wait()


def mapped_by_children() -> set[Path]:
    """Return the files of shared memory that this process's children have mapped."""
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{child.pid}/maps").read_text().splitlines()
            found |= {Path(line.split(maxsplit=5)[5]) for line in lines if str(SNAPSHOTS) in line}
    return found


def test_shared_memory_of_a_killed_command_goes(tmp_path: Path) -> None:
    """Not that of others: made before, or open in a process that lives."""
    mark = os.urandom(6).hex()
    old, used, own = (SNAPSHOTS / f"sglang_loads_test_{mark}_{name}.shm" for name in ("old", "used", "own"))
    old.touch()
    time.sleep(0.1)
    command = [sys.executable, supervise.__file__, "sh", "-c", f"echo x > {own}; sleep 600"]
    supervisor = subprocess.Popen(command, stdin=subprocess.PIPE)
    try:
        with used.open("w"):
            wait_for(own.exists)
            assert supervisor.stdin is not None
            supervisor.stdin.close()
            supervisor.wait(20)
            assert not own.exists() and used.exists() and old.exists()
    finally:
        supervisor.kill()
        for file in (old, used, own):
            file.unlink(missing_ok=True)


def test_supervised_command_dies_with_a_killed_parent(tmp_path: Path) -> None:
    """The command's own children too, and its temporary folder goes; SIGKILL lets the parent clean up nothing."""
    note = tmp_path / "pids"
    command = f"echo $$ $TMPDIR > {note}.new; sleep 600 & echo $! >> {note}.new; mv {note}.new {note}; wait"
    parent_code = (
        "import subprocess, sys, time\n"
        f"subprocess.Popen([sys.executable, {supervise.__file__!r}, 'sh', '-c', {command!r}], stdin=subprocess.PIPE)\n"
        "time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code])
    try:
        wait_for(note.exists)
        shell, temporary, sleeper = note.read_text().split()
        assert psutil.pid_exists(int(shell)) and psutil.pid_exists(int(sleeper)) and os.path.isdir(temporary)
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    wait_for(lambda: not psutil.pid_exists(int(shell)) and not psutil.pid_exists(int(sleeper)))
    wait_for(lambda: not os.path.exists(temporary))


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
