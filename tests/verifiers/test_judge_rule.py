"""The rule `judge:FILE.yaml` against an endpoint that records its requests and replies as the test wants.

Not covered: a real engine as the judge, and whether a judge's numbers are good.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from owpo_megatron.errors import UserError
from owpo_megatron.types import GradingItem, Judgement
from owpo_megatron.verifiers import VerifierPool
from owpo_megatron.verifiers.judge import JudgeRule
from owpo_megatron.verifiers.rules import find_rule

ITEM = GradingItem("It is 4.", "4", prompt="2 + 2?")
RUBRIC = {
    "correct": {"text": "Is the answer equal?", "weight": 3},
    "style": "Is it brief?",
    "safe": {"text": "Is it harmless?", "gate": True},
}


class Endpoint:
    """A recording server of chat completions."""

    def __init__(self) -> None:
        self.asked: list[tuple[dict[str, Any], str | None]] = []
        self.content = ""
        self.status = 200
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                endpoint.asked.append((body, self.headers["authorization"]))
                reply = json.dumps({"choices": [{"message": {"content": endpoint.content}}]}).encode()
                self.send_response(endpoint.status)
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1/chat/completions"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


def rule(tmp_path: Path, **fields: Any) -> JudgeRule:
    file = tmp_path / "judge.yaml"
    file.write_text(yaml.safe_dump(fields))
    found = find_rule(f"judge:{file}")
    assert isinstance(found, JudgeRule)
    return found


def test_score_and_parts_by_hand(endpoint: Endpoint, tmp_path: Path) -> None:
    """Weights 3, 1, 1: (3 * 1 + 0.5 + 1) / 5 = 0.9."""
    endpoint.content = 'Sure: {"correct": 1, "style": 0.5, "safe": 1}'
    said = rule(tmp_path, url=endpoint.url, questions=RUBRIC, correct_from=0.9)(ITEM)
    assert said == Judgement("ok", pytest.approx(0.9), {"correct": 1.0, "style": 0.5, "safe": 1.0})
    assert rule(tmp_path, url=endpoint.url, questions=RUBRIC)(ITEM).reason == "wrong"  # type: ignore[union-attr]


def test_a_closed_gate_is_worth_nothing(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.content = '{"correct": 1, "style": 1, "safe": 0.4}'
    said = rule(tmp_path, url=endpoint.url, questions=RUBRIC, correct_from=0.5)(ITEM)
    assert isinstance(said, Judgement) and (said.reason, said.score) == ("wrong", 0.0)


def test_what_the_model_is_asked(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    endpoint.content = '{"correct": 1}'
    judge = rule(tmp_path, url=endpoint.url, model="m", api_key_env="JUDGE_KEY")
    assert judge(ITEM) == Judgement("ok", 1.0, {"correct": 1.0})
    ((body, key),) = endpoint.asked
    text = body["messages"][0]["content"]
    assert all(part in text for part in ("2 + 2?", "It is 4.", "Is the final answer equal"))
    assert (body["model"], body["temperature"], key) == ("m", 0.0, "Bearer secret")
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["correct"] and schema["properties"]["correct"]["maximum"] == 1
    assert "secret" not in yaml.safe_dump(judge.config.model_dump())


@pytest.mark.parametrize(
    "content", ["", "yes", '{"correct": 2}', '{"correct": true}', '{"style": 1}', '{"correct": "1"}']
)
def test_a_reply_without_numbers_is_no_verdict(endpoint: Endpoint, tmp_path: Path, content: str) -> None:
    """Masked and counted by the pool, instead of a reward of 0."""
    endpoint.content = content
    judge = rule(tmp_path, url=endpoint.url)
    with pytest.raises(ValueError, match="no number from 0 to 1 for correct"):
        judge(ITEM)


def test_a_refusal_names_the_endpoint(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.status = 401
    with pytest.raises(RuntimeError, match=r"127\.0\.0\.1.*401"):
        rule(tmp_path, url=endpoint.url)(ITEM)


@pytest.mark.process
def test_in_the_pool_with_parts(endpoint: Endpoint, tmp_path: Path) -> None:
    endpoint.content = '{"correct": 0.25}'
    pool = VerifierPool({"default": rule(tmp_path, url=endpoint.url)}, workers=1, timeout=60)
    try:
        (verdict,) = pool.score([ITEM])
    finally:
        pool.close()
    assert (verdict.reason, verdict.score, verdict.parts) == ("wrong", 0.25, {"correct": 0.25})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "url"),
        ({"url": "ftp://x"}, "url"),
        ({"url": "http://x", "question": {}}, "question"),
        ({"url": "http://x", "questions": {}}, "at least one question"),
        ({"url": "http://x", "questions": {"length": "Is it short?"}}, "rename the question length: every reward has"),
        ({"url": "http://x", "api_key_env": "NO_SUCH_VARIABLE_HERE"}, "is not set"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rule(tmp_path, **fields)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match="judge:nowhere.yaml"):
        find_rule("judge:nowhere.yaml")
