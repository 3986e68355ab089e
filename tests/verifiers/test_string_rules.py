"""The rules that need no parser: DAPO, GSM8K, multiple choice; and rules of the user's, in real processes."""

from __future__ import annotations

import http.server
import json
import threading

import hostile_rules
import pytest

from owpo_megatron.config import VerifierConfig
from owpo_megatron.errors import UserError
from owpo_megatron.types import GradingItem
from owpo_megatron.verifiers import make_verifier
from owpo_megatron.verifiers.rules import TRIVIAL_RULES, find_rule


def right(rule, response, answer):
    return find_rule(rule)(GradingItem(response, answer)) == "ok"


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("Answer: 42", "42", True), ("answer : 42", "42", True), ("Answer:\n42", "42", True),
        ("Answer: 41\nAnswer: 42", "42", True),
        ("Answer: 42\nAnswer: 41", "42", False), ("Answer: 41, Answer: 42", "42", False),
        ("Answer: **42**", "42", False),
        ("Answer: 42.", "42", False), ("Answer: 42.0", "42", False), ("Answer: 84/2", "42", False),
        ("Answer: 43 = 42", "42", True),
        ("Answer: 42 degrees", "42", True), ("Answer: square42ways", "42", True), ("Answer: 4 2", "42", True),
        ("Answer: $42", "42", True), ("Answer: 1{,}234", "1234", True), ("Answer: 1,234", "1234", True),
        (r"Answer: \text{10}", "10", True), (r"Answer: \sqrt3", r"\sqrt{3}", True),
        (r"Answer: \frac12", r"\frac{1}{2}", True),
        ("Answer: 1/2", r"\frac{1}{2}", False), (r"\boxed{42}", "42", False), ("Answer: 42", r"\boxed{42}", True),
        ("答案: 42", "42", False), ("x" * 1000 + "\nAnswer: 42", "42", True), ("Answer: 42" + "x" * 300, "42", False),
    ],
)  # fmt: skip
def test_dapo_with_its_surprises(response, answer, expected):
    assert right("dapo", response, answer) is expected


def test_dapo_strict_box():
    assert right("dapo_strict_box", r"so \boxed{42}", "42")
    assert not right("dapo_strict_box", r"\boxed{42}" + "x" * 101, "42")
    assert not right("dapo_strict_box", "Answer: 42", "42")


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("6*7=42\n#### 42", "42", True), ("#### 1,234", "1234", True), ("#### $18.00", "18", True),
        ("#### 41\n#### 42", "42", True),
        ("#### -3", "3", False), ("#### 42 apples", "42", True), ("The answer is 42.", "42", True),
        (r"\boxed{42}", "42", True),
        ("it is 42", "42", False), ("#### 41 or 42", "42", False), ("#### 1 2", "12", False), ("#### 1/2", "0.5", True),
        ("#### 1/0", "1", False), ("####", "42", False), ("#### 42", "6*7=42\n#### 42", True),
    ],
)  # fmt: skip
def test_gsm8k(response, answer, expected):
    assert right("gsm8k", response, answer) is expected


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("The answer is (B).", "B", True), ("the answer is B", "B", True), ("Answer: B", "B", True),
        ("**Answer: (b)**", "B", True),
        (r"\boxed{B}", "B", True), (r"\boxed{\text{(B)}}", "B", True), ("Answer: B) 42 apples", "B", True),
        ("B", "B", True),
        ("Answer: (B) the cat and A dog", "B", False), ("Answer: B or C", "B", False), ("Answer: B, C", "B", False),
        ("The answer is not B.", "B", False), ("Answer: A", "B", False), ("I think B fits", "B", False),
        ("Answer: J", "(J)", True),
        ("Answer: A cat is in the box", "A", False), ("The answer is neither B nor C", "B", False), ("", "B", False),
    ],
)  # fmt: skip
def test_multiple_choice(response, answer, expected):
    """Several letters are no answer, even where the right one is among them."""
    assert right("multiple_choice", response, answer) is expected


@pytest.mark.parametrize("name", TRIVIAL_RULES)
@pytest.mark.parametrize(
    "response", ["", "x" * 100_000, "\\boxed{" * 5000, "Answer:" * 5000, "\x00\ud800", "####" * 5000]
)
def test_trivial_rules_never_raise(name, response):
    answer = "1,2=3" if name == "countdown" else "42"
    assert find_rule(name)(GradingItem(response, answer)) in ("no_answer", "wrong", "parse_failed", "too_long")


@pytest.mark.process
def test_a_function_of_the_users():
    verifier = make_verifier(VerifierConfig(rule="python:hostile_rules:same_length", workers=1), {"any"})
    orders = [("abc", "xyz"), ("abc", "x"), ("boom", "x"), ("odd", "x")]
    verdicts = verifier.score([GradingItem(response, answer, "any") for response, answer in orders])
    verifier.close()
    assert [v.reason for v in verdicts] == ["ok", "wrong", "crashed", "crashed"]
    assert hostile_rules.same_length("a", "b")


@pytest.mark.parametrize(
    "name", ["maths", "python:nowhere:f", "python:json:nothing", "python:json", "python:json:__doc__", "ftp://x"]
)
def test_an_unknown_rule_is_the_users_mistake(name):
    with pytest.raises(UserError, match="verifier.rule"):
        find_rule(name)


@pytest.mark.process
def test_an_endpoint():
    """A real server: verdicts, a reason, a refusal and nonsense. A proxy between is not covered."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            item = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            replies = {"reason": {"correct": False, "reason": "too_long"}, "nonsense": [1]}
            reply = replies.get(item["response"], {"correct": item["response"] == item["answer"]})
            body = json.dumps(reply).encode()
            self.send_response(500 if item["response"] == "refuse" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    verifier = make_verifier(VerifierConfig(rule=f"http://127.0.0.1:{server.server_port}/grade", workers=1), {"any"})
    orders = ["42", "41", "reason", "refuse", "nonsense"]
    verdicts = verifier.score([GradingItem(response, "42", "any") for response in orders])
    verifier.close()
    server.shutdown()
    server.server_close()
    assert [v.reason for v in verdicts] == ["ok", "wrong", "too_long", "crashed", "crashed"]
