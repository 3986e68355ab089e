"""A TMPDIR that is too long for sockets: another folder is used, and a dying server's error begins with the reason."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine import supervise
from owpo_megatron.engine.server import Server


@pytest.fixture
def tmpdir(monkeypatch):
    def choose(folder: str, runtime: str = "") -> str | None:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        return supervise.short_folder()

    return choose


def test_a_short_one_stays(tmpdir, tmp_path):
    assert tmpdir("/tmp") is None


def test_a_long_one_is_left_for_one_with_room(tmpdir, tmp_path):
    """107 characters are all that a socket's name may have; SGLang's own names in our folder take up to 48."""
    deep = tmp_path / ("scratch_of_a_job_" * 6)
    deep.mkdir()
    assert tmpdir(str(deep)) == "/tmp"
    short = Path(tempfile.mkdtemp(dir="/var/tmp"))
    try:
        assert tmpdir(str(deep), runtime=str(short)) == str(short)
        os.chmod(short, 0o500)
    finally:
        short.chmod(0o700)
        short.rmdir()
    assert tmpdir(str(deep), runtime=str(short)) == "/tmp", "a folder that is not there is not used"


def test_the_boundary(tmpdir):
    longest = "/tmp/".ljust(supervise.MAX_SOCKET_PATH - supervise.SOCKET_ROOM, "x")
    os.makedirs(longest, exist_ok=True)
    try:
        assert tmpdir(longest) is None and tmpdir(longest + "x") == "/tmp"
    finally:
        os.rmdir(longest)


def test_the_reason_of_a_dead_server_is_in_the_first_line(tmp_path, monkeypatch):
    """The command line shows the first line of an error alone."""
    monkeypatch.setattr("owpo_megatron.engine.server.check_environment", lambda *args: None)
    monkeypatch.setattr("owpo_megatron.engine.server.server_arguments", lambda *args: {})
    server = Server(EngineConfig(), tmp_path, "float32", {}, tmp_path / "engine.log")
    lines = [
        "Traceback (most recent call last):",
        '  File "x.py", line 3',
        "zmq.error.ZMQError: ipc path is longer",
        "bye",
    ]
    (tmp_path / "engine.log").write_text("\n".join(lines) + "\n")
    first, *rest = str(server._failure("exited with status 1 before it answered")).splitlines()
    assert first.startswith(
        "SGLang exited with status 1 before it answered: zmq.error.ZMQError: ipc path is longer; the"
    )
    assert rest == lines
    (tmp_path / "engine.log").write_text("")
    assert str(server._failure("did not answer")).startswith("SGLang did not answer; the end of")
