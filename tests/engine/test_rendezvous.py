"""Engines that announce themselves: for their owner alone; failures are reported, restarts are found."""

from __future__ import annotations

import http.server
import json
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from owpo_megatron.config import EngineConfig
from owpo_megatron.engine import Announcement, announce, announce_failure, withdraw
from owpo_megatron.engine.rendezvous import AnnouncedEngine, announced_engines, read
from owpo_megatron.errors import EngineError

KEY = "the-key"


@pytest.fixture
def server() -> Iterator[str]:
    """Answers whoever has the key, as an engine would."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            right = self.headers.get("authorization") == f"Bearer {KEY}"
            self.send_response(200 if right else 401)
            self.end_headers()
            self.wfile.write(json.dumps({"weight_version": "7"}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()


def config(timeout: float = 20, announced: int = 1) -> EngineConfig:
    return EngineConfig(startup_timeout=timeout, announced=announced)


def test_what_is_announced_is_read_by_its_owner_alone(tmp_path: Path) -> None:
    told = Announcement("http://node7:21844", KEY, "node7", 812)
    announce(tmp_path / "4711.0", 0, told)
    assert read(tmp_path / "4711.0", 0) == told and read(tmp_path / "4711.0", 1) is None
    assert stat.S_IMODE((tmp_path / "4711.0" / "engine_0.json").stat().st_mode) == 0o600
    assert [file.name for file in (tmp_path / "4711.0").iterdir()] == ["engine_0.json"]
    withdraw(tmp_path / "4711.0", 0)
    assert read(tmp_path / "4711.0", 0) is None


def test_engines_are_waited_for(server: str, tmp_path: Path) -> None:
    """The second comes late, after an announcement that outlived its engine."""
    announce(tmp_path, 0, Announcement(server, KEY, "here", 1))
    announce(tmp_path, 1, Announcement("http://127.0.0.1:9", KEY, "here", 2))
    late = threading.Timer(1.0, announce, (tmp_path, 1, Announcement(server, KEY, "here", 3)))
    late.start()
    first, second = announced_engines(tmp_path, config(announced=2))
    assert [engine.client.weight_version() for engine in (first, second)] == [7, 7]
    first.close(), second.close()


def test_an_engine_that_moved_is_found_again(server: str, tmp_path: Path) -> None:
    announce(tmp_path, 0, Announcement(server, KEY, "here", 1))
    (engine,) = announced_engines(tmp_path, config())
    before = engine.client.incarnation
    announce(tmp_path, 0, Announcement(server, "an old key", "here", 1))
    threading.Timer(1.0, announce, (tmp_path, 0, Announcement(server, KEY, "elsewhere", 2))).start()
    engine.restart()
    assert engine.client.weight_version() == 7 and engine.client.incarnation > before
    engine.close()


def test_a_failure_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failure is raised without waiting."""
    announce_failure(tmp_path, 0, "engine.python = /no/python: no such interpreter")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited"))
    with pytest.raises(EngineError, match="engine 0 did not start: engine.python = /no/python"):
        announced_engines(tmp_path, config())


def test_waiting_ends(tmp_path: Path) -> None:
    """Announcements of an earlier attempt are in another folder and are ignored."""
    announce(tmp_path / "4711.0", 0, Announcement("http://127.0.0.1:9", KEY, "here", 1))
    with pytest.raises(EngineError, match="engine 0 is not there after engine.startup_timeout = 0.6 s"):
        AnnouncedEngine(tmp_path / "4711.1", 0, config(0.6)).connect(time.monotonic() + 0.6)
