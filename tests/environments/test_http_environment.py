"""An environment over HTTP, against a server in this process with the documented protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from owpo_megatron.environments import Message, Observation, Problem
from owpo_megatron.environments.http import HttpEnvironment

PROBLEM = Problem("p", "count", "3", "default", (Message("user", "count"),))


class Handler(BaseHTTPRequestHandler):
    """Counts the steps of each episode; done at the third."""

    seen: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        if "reset" in body:
            answer: dict[str, Any] = {"messages": [{"role": "user", "content": body["reset"]["text"] + "!"}]}
        elif body["step"] == 3:
            answer = {"observation": "", "done": True, "rewards": {"reward": 1.0}}
        else:
            answer = {"observation": f"step {body['step']}", "done": False, "calls": 2, "errors": 1}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[str]:
    Handler.seen = []
    found = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}/env"
    found.shutdown()
    found.server_close()


def test_an_episode_over_http(server: str) -> None:
    environment = HttpEnvironment(server)
    assert environment.reset(PROBLEM) == [Message("user", "count!")]
    assert environment.step("a") == (Observation("step 1", 2, 1), False, None)
    environment.step("b")
    assert environment.step("c") == (Observation("", 0, 0), True, {"reward": 1.0})
    reset, *steps = Handler.seen
    assert reset["reset"] == {
        "id": "p", "text": "count", "answer": "3", "domain": "default",
        "messages": [{"role": "user", "content": "count"}],
    }  # fmt: skip
    assert [(one["step"], one["reply"]) for one in steps] == [(1, "a"), (2, "b"), (3, "c")]
    assert len({one["episode"] for one in Handler.seen}) == 1
    other = HttpEnvironment(server)
    other.reset(PROBLEM)
    assert Handler.seen[-1]["episode"] != reset["episode"]
