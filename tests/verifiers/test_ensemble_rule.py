"""The rule `ensemble:FILE.yaml`: scores of several reward models, combined. Members are functions of this file, and one
endpoint; whether reward models are any good is not tested.
"""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from owpo_megatron.config import VerifierConfig
from owpo_megatron.errors import UserError
from owpo_megatron.types import GradingItem, Judgement
from owpo_megatron.verifiers import make_verifier
from owpo_megatron.verifiers.ensemble import EnsembleRule, combined
from owpo_megatron.verifiers.rules import find_rule

ITEM = GradingItem("abcd", "x")
MINE = "python:test_ensemble_rule:"


def kind(response: str, answer: str) -> float:
    return 0.9


def strict(response: str, answer: str) -> dict[str, Any]:
    return {"score": len(response) / 10, "parts": {"inner": 1.0}}


def accepts(response: str, answer: str) -> bool:
    return True


def slow(response: str, answer: str) -> str:
    return "timeout"


def breaks(response: str, answer: str) -> float:
    raise ZeroDivisionError


def ensemble(folder: Path, *names: str, **fields: Any) -> EnsembleRule:
    file = folder / "ensemble.yaml"
    file.write_text(yaml.safe_dump({"rules": {name: MINE + name for name in names}} | fields))
    rule = find_rule(f"ensemble:{file}")
    assert isinstance(rule, EnsembleRule)
    return rule


def test_by_hand(tmp_path: Path) -> None:
    """Scores 0.9, 0.4 and a verdict, which counts 1: the least 0.4; mean 2.3 / 3, variance (0.1333^2 + 0.3667^2 +
    0.2333^2) / 3 = 0.0689, standard deviation 0.2625. Parts are the members' scores, not the parts inside them."""
    names = ("kind", "strict", "accepts")
    parts = {"kind": 0.9, "strict": 0.4, "accepts": 1.0}
    assert ensemble(tmp_path, *names)(ITEM) == Judgement("wrong", 0.4, parts)
    assert ensemble(tmp_path, *names, correct_from=0.4)(ITEM) == Judgement("ok", 0.4, parts)
    for combine, k, score in (("mean_minus_std", 2.0, 0.24173), ("mean_minus_variance", 2.0, 0.62889)):
        said = ensemble(tmp_path, *names, combine=combine, k=k)(ITEM)
        assert isinstance(said, Judgement) and said.score == pytest.approx(score, abs=1e-5)


def test_members_that_agree_cost_nothing() -> None:
    for combine in ("min", "mean_minus_std", "mean_minus_variance"):
        assert combined([0.25] * 4, combine, 5.0) == 0.25  # type: ignore[arg-type]


def test_a_member_without_a_verdict_leaves_none(tmp_path: Path) -> None:
    """Masked and counted by the pool, instead of being judged by the others alone."""
    assert ensemble(tmp_path, "kind", "slow")(ITEM) == "timeout"
    with pytest.raises(ZeroDivisionError):
        ensemble(tmp_path, "kind", "breaks")(ITEM)


def test_it_travels_to_a_worker(tmp_path: Path) -> None:
    rule = pickle.loads(pickle.dumps(ensemble(tmp_path, "kind", "strict")))
    rule.warm()
    assert rule(ITEM).score == 0.4


@pytest.fixture
def endpoint() -> Iterator[str]:
    class Reward(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"score": 0.75}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            """No lines on stderr."""

    server = HTTPServer(("127.0.0.1", 0), Reward)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.process
def test_as_the_rule_of_a_run(endpoint: str, tmp_path: Path) -> None:
    """An endpoint beside a function, in the pool of workers, by the configuration's name."""
    file = tmp_path / "ensemble.yaml"
    file.write_text(yaml.safe_dump({"rules": {"far": endpoint, "kind": f"{MINE}kind"}, "correct_from": 0.7}))
    verifier = make_verifier(VerifierConfig(rule=f"ensemble:{file}", workers=1, timeout=60), ["default"])
    try:
        (verdict,) = verifier.score([ITEM])
    finally:
        verifier.close()
    assert (verdict.reason, verdict.score, verdict.parts) == ("ok", 0.75, {"far": 0.75, "kind": 0.9})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "ensemble.yaml: rules = .*: required"),
        ({"rules": {"a": f"{MINE}kind"}}, "rules = a: give at least two reward models"),
        ({"rules": {"a": f"{MINE}kind", "b": f"{MINE}kind"}}, "rules.a = .*kind: is named twice"),
        ({"rules": {"a": f"{MINE}kind", "length": f"{MINE}strict"}}, "rules.length = .*: rename it"),
        ({"rules": {"a": f"{MINE}kind", "b": "ensemble:more.yaml"}}, "rules.b = .*: an ensemble is no part"),
        ({"rules": {"a": f"{MINE}kind", "b": "math"}}, "rules.b = math: the built-in rules judge answers alone"),
        ({"rules": {"a": f"{MINE}kind", "b": f"{MINE}nothing"}}, "python:test_ensemble_rule:nothing: make it import"),
        ({"combine": "max"}, "combine = max"),
        ({"combine": "mean_minus_std"}, "k = .missing.: mean_minus_std needs it"),
        ({"k": 1.0}, "k = 1.0: the minimum has no weight"),
        ({"combine": "mean_minus_variance", "k": 0}, "k = 0"),
        ({"weights": {}}, "weights = .*: unknown field"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    rules = {} if "rules" in fields or not fields else {"rules": {"a": f"{MINE}kind", "b": f"{MINE}strict"}}
    file = tmp_path / "ensemble.yaml"
    file.write_text(yaml.safe_dump(rules | fields))
    with pytest.raises(UserError, match=message):
        find_rule(f"ensemble:{file}")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match="ensemble:nowhere.yaml: no such file"):
        find_rule("ensemble:nowhere.yaml")
