"""Rules that return a graded reward and named parts: from Python, over HTTP, and through the pool."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from owpo_megatron.types import GradingItem, Judgement, Verdict
from owpo_megatron.verifiers import DirectVerifier, VerifierPool
from owpo_megatron.verifiers.external import HttpRule, PythonRule, _result


@pytest.mark.parametrize(
    ("returned", "result"),
    [
        (True, "ok"),
        (0, "wrong"),
        ("no_answer", "no_answer"),
        (0.25, Judgement("wrong", 0.25)),
        (1.5, Judgement("ok", 1.5)),
        ({"correct": True}, "ok"),
        ({"correct": False, "reason": "no_answer"}, "no_answer"),
        ({"score": 0.5}, Judgement("wrong", 0.5)),
        ({"score": 0.5, "correct": True}, Judgement("ok", 0.5)),
        ({"correct": True, "parts": {"style": 1}}, Judgement("ok", None, {"style": 1.0})),
        ({"score": 1, "parts": {"style": 0.5}}, Judgement("ok", 1.0, {"style": 0.5})),
    ],
)
def test_what_a_rule_may_return(returned: Any, result: Any) -> None:
    assert _result(returned, "mine") == result


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "mine returned None; a rule returns True, False, a finite number"),
        (float("nan"), "mine returned nan"),
        ("yes", "mine returned 'yes'"),
        ({}, "mine returned None"),
        ({"correct": True, "score": "high"}, "mine: score is 'high'; give a finite number"),
        ({"correct": True, "parts": {"style": None}}, "mine: parts are {'style': None}; give finite numbers by name"),
        ({"correct": True, "parts": [1]}, r"mine: parts are \[1\]"),
    ],
)
def test_what_it_may_not(returned: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _result(returned, "mine")


def share_of_letters(response: str, answer: str) -> dict[str, Any]:
    share = sum(letter in response for letter in answer) / len(answer)
    return {"score": share, "parts": {"short": float(len(response) < 5)}}


def item(response: str) -> GradingItem:
    return GradingItem(response, "abcd", "letters")


def test_verdicts_of_a_python_rule() -> None:
    verifier = DirectVerifier({"letters": PythonRule("test_graded_rules", "share_of_letters")})
    first, second = verifier.score([item("ab"), item("abcd and more")])
    assert (first.correct, first.reason, first.score, first.reward) == (False, "wrong", 0.5, 0.5)
    assert first.parts == {"short": 1.0}
    assert (second.correct, second.reward, second.parts) == (True, 1.0, {"short": 0.0})
    assert Verdict(True, "ok").reward == 1.0 and Verdict(False, "no_answer").reward == 0.0


def names_the_problem(response: str, answer: str, prompt: str = "") -> bool:
    return bool(prompt) and prompt in response


def test_a_function_with_a_parameter_prompt_gets_it() -> None:
    """One without gets two arguments, as does a built-in one."""
    rule = PythonRule("test_graded_rules", "names_the_problem")
    asked = GradingItem("2 + 2? It is 4.", "4", prompt="2 + 2?")
    assert rule(asked) == "ok" and rule(GradingItem("It is 4.", "4", prompt="2 + 2?")) == "wrong"
    assert PythonRule("operator", "contains")(asked) == "ok"


@pytest.fixture
def endpoint() -> Iterator[str]:
    class Judge(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(share_of_letters(asked["response"], asked["answer"])).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """No lines on stderr."""

    server = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.process
def test_verdicts_of_an_endpoint_through_the_pool(endpoint: str) -> None:
    pool = VerifierPool({"letters": HttpRule(endpoint)}, workers=1)
    try:
        first, second = pool.score([item("ab"), item("abcd")])
    finally:
        pool.close()
    assert (first.reason, first.score, first.parts) == ("wrong", 0.5, {"short": 1.0})
    assert (second.reason, second.reward) == ("ok", 1.0)
