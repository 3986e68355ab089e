"""`owpo verify` and `owpo bench verifier` from files to files; figures are in docs/benchmarks/verifier.md."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from owpo_megatron.bench import verifier as bench
from owpo_megatron.cli.main import app
from owpo_megatron.errors import UserError
from owpo_megatron.verifiers.cases import read_cases

pytestmark = pytest.mark.process


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def test_a_verdict_a_line(tmp_path):
    cases, out = tmp_path / "cases.jsonl", tmp_path / "out" / "verdicts.jsonl"
    cases.write_text(
        lines(
            {
                "id": "a",
                "gold": "42",
                "prediction": r"so \boxed{42}",
                "form": "response",
                "expected": True,
                "suite": "one",
            },
            {"id": "b", "gold": "42", "prediction": "it is 42", "form": "response", "expected": False, "suite": "two"},
            {"id": "c", "gold": "x+1", "prediction": "1+x", "form": "answer"},
            {"id": "d", "gold": "42", "prediction_expr": {"pre": r"\boxed{", "unit": "1+", "n": 9000, "post": "1}"}},
        )
    )
    result = CliRunner().invoke(app, ["verify", str(cases), "--json", str(out), "--workers", "1"])
    assert result.exit_code == 0, result.output
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(v["id"], v["correct"], v["reason"]) for v in verdicts] == [
        ("a", True, "ok"), ("b", False, "no_answer"), ("c", True, "ok"), ("d", False, "no_answer"),
    ]  # fmt: skip
    assert all(v["seconds"] >= 0 for v in verdicts)
    assert "4 verdicts: no_answer 2, ok 2" in result.output and "two" in result.output


def test_other_rules_and_data_sets(tmp_path):
    cases = tmp_path / "cases.jsonl"
    rows = [{"gold": "42", "prediction": "Answer: 43 = 42"}, {"gold": "42", "prediction": r"\boxed{42}"}]
    rows.append(rows[1] | {"config": {"rule": "dapo_strict_box"}})
    cases.write_text(lines(*rows))
    out = tmp_path / "out.jsonl"
    assert CliRunner().invoke(app, ["verify", str(cases), "--rule", "dapo", "--json", str(out)]).exit_code == 0
    assert [json.loads(line)["reason"] for line in out.read_text().splitlines()] == ["ok", "no_answer", "ok"]
    golds = tmp_path / "golds.jsonl"
    golds.write_text(lines({"id": 1, "answer": r"\frac{1}{2}"}, {"id": 2, "answer": "7"}))
    result = CliRunner().invoke(app, ["verify", str(golds), "--golds"])
    assert result.exit_code == 0 and "2 verdicts: ok 2" in result.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cases.jsonl:1 = {: write one JSON object per line"),
        ("[1]\n", "write one JSON object per line"),
        (lines({"gold": "1"}), "cases.jsonl:1 prediction = None"),
        (lines({"gold": 1, "prediction": "1"}), "cases.jsonl:1 gold = 1: give it as a string"),
        (
            "\n" + lines({"gold": "1", "prediction": "1", "form": "x"}),
            "cases.jsonl:2 form = x: use `answer` or `response`",
        ),
    ],
)
def test_a_mistake_names_its_line(tmp_path, text, said):
    (tmp_path / "cases.jsonl").write_text(text)
    with pytest.raises(UserError) as error:
        read_cases(tmp_path / "cases.jsonl", "math")
    assert said in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="name a readable file"):
        read_cases(tmp_path / "nowhere.jsonl", "math")


@pytest.mark.slow
def test_the_bench_has_its_rows(tmp_path, monkeypatch):
    """Small counts; the figures mean nothing here."""
    monkeypatch.setattr(bench, "WARM_UP", 2)
    monkeypatch.setattr(bench, "COUNTS", {"short": 4, "8k": 2, "32k": 2})
    monkeypatch.setattr(bench, "HOSTILE_ANSWERS", 20)
    out = tmp_path / "bench.json"
    result = CliRunner().invoke(app, ["bench", "verifier", "--workers", "1", "--json", str(out)])
    assert result.exit_code == 0, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [(row["gold"], row["length"]) for row in rows] == [
        (gold, length) for gold in ("integer", "latex") for length in ("short", "8k", "32k")
    ] + [("mixed", "2k")]
    assert rows[-1]["hostile"] == 2 and rows[-1]["seconds"] > 0 and rows[0]["pool_1_per_s"] > 0


@pytest.mark.slow
def test_a_fuzz_run():
    (row,) = bench.fuzz(60, workers=1, timeout=4.0, seed=5, log=lambda text: None)
    assert row["fuzzed"] == 60 and row["pool_alive"] and row["timeout"] == row["crashed"] == 0
