"""The image's health check, against real processes that listen or do not. Docker's own calling of it is not covered."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

SCRIPT = Path(__file__).parents[2] / "tools" / "container_health.py"


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@contextmanager
def listening() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def health_of(*words: str) -> int:
    """The check's exit code for a first process with these words on its command line."""
    first = subprocess.Popen([sys.executable, "-c", "input()", "owpo", *words], stdin=subprocess.PIPE)
    try:
        return subprocess.run([sys.executable, str(SCRIPT), "--pid", str(first.pid)], capture_output=True).returncode
    finally:
        first.kill()
        first.wait()


def test_a_server_that_answers_is_healthy_and_one_that_does_not_is_not() -> None:
    with listening() as port:
        assert health_of("serve", "model", "--host", "0.0.0.0", "--port", str(port)) == 0
        assert health_of("serve", "model", f"--port={port}") == 0
    assert health_of("serve", "model", "--port", str(port)) == 1


def test_a_container_that_trains_is_healthy() -> None:
    assert health_of("train", "-c", "run.yaml") == 0
