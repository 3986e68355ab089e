"""An engine's HTTP server without a model: it answers from recorded rollouts, and wrongly where that is asked for.

    python stand_in.py ROLLOUTS.jsonl --fault nan --times 1       # prints its port

A process of its own with the endpoints of SGLang that a run uses, for faults that a real SGLang cannot be made to have.
It answers any weights, since the recorded samples are those of the run's own policy.
"""

from __future__ import annotations

import argparse
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answers = list[dict[str, Any]]
NAN, INF = float("nan"), float("inf")


def _meta(answers: Answers, **fields: Any) -> Answers:
    answers[0]["meta_info"] |= fields
    return answers


def _logp(answers: Answers, value: Any) -> Answers:
    answers[0]["meta_info"]["output_token_logprobs"][0][0] = value
    return answers


def _token(answers: Answers, value: int) -> Answers:
    answers[0]["meta_info"]["output_token_logprobs"][0][1] = value
    answers[0]["output_ids"][0] = value
    return answers


def _repeated(answers: Answers, times: int) -> Answers:
    first = answers[0]
    first["output_ids"] = first["output_ids"] * times
    first["meta_info"]["output_token_logprobs"] = first["meta_info"]["output_token_logprobs"] * times
    return answers


def _shifted(answers: Answers) -> Answers:
    for answer in answers:
        for pair in answer["meta_info"]["output_token_logprobs"]:
            pair[0] -= 3.0
    return answers


def _shorter(answers: Answers) -> Answers:
    answers[0]["output_ids"] = answers[0]["output_ids"][:-1]
    return answers


WRONG: dict[str, Any] = {
    "nan": lambda answers: _logp(answers, NAN),
    "minus infinity": lambda answers: _logp(answers, -INF),
    "positive": lambda answers: _logp(answers, 5.0),
    "null": lambda answers: _logp(answers, None),
    "lengths": _shorter,
    "too many tokens": lambda answers: _repeated(answers, 9),
    "no tokens": lambda answers: _repeated(answers, 0),
    "id too large": lambda answers: _token(answers, 999999),
    "id negative": lambda answers: _token(answers, -5),
    "abort": lambda answers: _meta(answers, finish_reason={"type": "abort", "message": "x"}),
    "stale": lambda answers: _meta(answers, weight_version="-7"),
    "version foo": lambda answers: _meta(answers, weight_version="foo"),
    "one missing": lambda answers: answers[1:],
    "another object": lambda answers: {"foo": 1},
    "numbers": lambda answers: [1, 2, 3],
    "off by three nats": _shifted,
}
STATUS = {"500": 500, "429": 429, "503": 503}
OTHER = ("html", "cut", "closed", "slow")
FAULTS = (*WRONG, *STATUS, *OTHER)


class Engine:
    """State of the server: samples by (prompt tokens, seed), the version of its weights, and its fault."""

    def __init__(self, rollouts: Path, fault: str | None, times: int, after: int):
        self.samples: dict[tuple[tuple[int, ...], int], dict[str, Any]] = {}
        for line in rollouts.read_text().splitlines():
            rollout = json.loads(line)
            self.samples[tuple(rollout["prompt"]["token_ids"]), rollout["seed"]] = rollout
        self.fault, self.left, self.after = fault, times, after
        self.version = "0"
        self.lock = threading.Lock()

    def is_faulty(self) -> bool:
        """Whether this request is one of those that go wrong."""
        with self.lock:
            self.after -= 1
            if self.fault is None or self.after >= 0 or self.left == 0:
                return False
            self.left -= 1
            return True

    def answers(self, body: dict[str, Any]) -> Answers:
        prompts, parameters = body["input_ids"], body["sampling_params"]
        if isinstance(parameters, dict):
            prompts, parameters = [prompts], [parameters]
        return [self._answer(tuple(ids), one["sampling_seed"]) for ids, one in zip(prompts, parameters, strict=True)]

    def _answer(self, ids: tuple[int, ...], seed: int) -> dict[str, Any]:
        rollout = self.samples[ids, seed]
        pairs = [list(pair) for pair in zip(rollout["behaviour_logp"], rollout["response_ids"], strict=True)]
        meta = {"output_token_logprobs": pairs, "finish_reason": {"type": rollout["finish_reason"]}}
        return {"output_ids": list(rollout["response_ids"]), "meta_info": meta | {"weight_version": self.version}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: Engine

    def do_GET(self) -> None:
        self._json({"weight_version": self.engine.version, "served_model_name": "x", "tp_size": 1, "version": "0"})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/update_weight_version":
            self.engine.version = str(json.loads(body)["new_version"])
        if self.path != "/generate":
            self._json({"success": True, "message": ""})
            return
        answers = self.engine.answers(json.loads(body))
        if not self.engine.is_faulty():
            self._json(answers)
            return
        fault = str(self.engine.fault)
        if fault in WRONG:
            self._json(WRONG[fault](answers))
        elif fault in STATUS:
            self._json({"error": {"message": "no"}}, STATUS[fault])
        elif fault == "html":
            self._send(b"<html><body>504 Gateway Time-out</body></html>", 200, "text/html")
        elif fault == "cut":
            text = json.dumps(answers).encode()
            self._send(text[: len(text) // 2], 200, length=len(text))
            self.close_connection = True
        elif fault == "closed":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            time.sleep(3600)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(json.dumps(content).encode(), status)

    def _send(self, content: bytes, status: int, kind: str = "application/json", length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the output is the port alone."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that went away is part of some faults."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rollouts", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fault", choices=FAULTS)
    parser.add_argument("--times", type=int, default=1, help="requests that go wrong; -1: all")
    parser.add_argument("--after", type=int, default=0, help="requests before the first that goes wrong")
    options = parser.parse_args()
    Handler.engine = Engine(options.rollouts, options.fault, options.times, options.after)
    server = Server(("127.0.0.1", options.port), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
