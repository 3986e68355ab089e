"""Rules behind a URL: never through a proxy unless asked, tried again; and what stops when nothing can be graded."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from owpo_megatron.config import VerifierConfig
from owpo_megatron.errors import UserError
from owpo_megatron.types import GradingItem, Verdict
from owpo_megatron.verifiers import external, make_verifier
from owpo_megatron.verifiers.external import HttpRule
from owpo_megatron.verifiers.grading import refuse_failed_grading

ITEM = GradingItem("x", "42", "math", prompt="q")


class Endpoint(BaseHTTPRequestHandler):
    asked: list[dict]
    failing = 0  # connections that are closed without a reply

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked.append(body)
        if type(self).failing:
            type(self).failing -= 1
            self.connection.close()
            return
        reply = json.dumps({"correct": body["answer"] == "42"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    Endpoint.asked, Endpoint.failing = [], 0
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(external, "RETRIES", (0.0, 0.0))
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_a_proxy_of_the_environment_is_not_used(endpoint):
    assert HttpRule(endpoint)(ITEM) == "ok"
    assert Endpoint.asked[0]["prompt"] == "q"


def test_unless_asked(endpoint):
    with pytest.raises(RuntimeError, match="Connection refused|Errno"):
        HttpRule(endpoint, proxy=True)(ITEM)
    assert Endpoint.asked == []


def test_a_lost_connection_is_tried_again(endpoint):
    Endpoint.failing = 2
    assert HttpRule(endpoint)(ITEM) == "ok" and len(Endpoint.asked) == 3
    Endpoint.failing = 3
    with pytest.raises(RuntimeError, match=endpoint):
        HttpRule(endpoint)(ITEM)


@pytest.mark.process
def test_the_pool_says_why_and_the_configuration_reaches_the_rule(endpoint):
    for proxy, reason in ((False, "ok"), (True, "crashed")):
        config = VerifierConfig(rule=endpoint, workers=1, timeout=20, proxy=proxy)
        verifier = make_verifier(config, ["math"])
        try:
            (verdict,) = verifier.score([ITEM])
        finally:
            verifier.close()
        assert verdict.reason == reason
        assert (endpoint in verdict.detail) is proxy


def verdicts(*reasons):
    return [Verdict(reason == "ok", reason, detail=f"why {reason}") for reason in reasons]


def test_nothing_graded_stops_and_one_graded_answer_goes_on():
    refuse_failed_grading(verdicts("crashed", "timeout", "wrong"), "http://x")
    refuse_failed_grading([], "http://x")
    with pytest.raises(
        UserError, match=r"verifier.rule = http://x: no answer could be graded \(2 crashed, 1 timeout\): wh"
    ):
        refuse_failed_grading(verdicts("crashed", "timeout", "crashed"), "http://x")
    with pytest.raises(UserError, match="or raise verifier.timeout"):
        refuse_failed_grading(verdicts("timeout"), "python:a:b")
