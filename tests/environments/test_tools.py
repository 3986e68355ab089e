"""The tools that ship: what they answer, and what they refuse with a reason that the policy is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from owpo_megatron.environments import Message, Problem
from owpo_megatron.environments.calculator import Calculator, calculate
from owpo_megatron.environments.python_tool import PythonTool
from owpo_megatron.environments.search import Search
from owpo_megatron.environments.tools import ToolError
from owpo_megatron.errors import UserError
from owpo_megatron.verifiers.sandbox import why_refused

PROBLEM = Problem("p", "6 * 7?", "42", "default", (Message("user", "6 * 7?"),))


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("6 * 7", "42"),
        ("2 ** 10 - 1", "1023"),
        ("-7 // 2 + 7 % 4", "-1"),
        ("(1 + 2) / 4", "0.75"),
        ("sqrt(16) + max(1, 2.5)", "6.5"),
        ("gcd(12, 18)", "6"),
    ],
)
def test_the_calculator_computes_as_python(expression: str, value: str) -> None:
    assert calculate(expression) == value == str(eval(expression, vars(__import__("math")) | {"max": max}))


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os').system('true')", "().__class__", "9 ** 9 ** 9", "2 ** 5000", "1 / 0", "1 +", "x", "lambda: 1",
        "(" * 500 + "1" + ")" * 500, "sqrt(-1)", "round(number=1.5)", "'a' * 9", "True", "1e308 * 10 ** 400",
        "(-8) ** 0.5",
    ],
)  # fmt: skip
def test_the_calculator_refuses_all_else(expression: str) -> None:
    with pytest.raises(ToolError):
        calculate(expression)


def test_calls_and_answers_in_turns() -> None:
    environment = Calculator()
    system, user = environment.reset(PROBLEM)
    assert system.role == "system" and '"name": "calculator"' in system.content and user == PROBLEM.messages[0]
    assert Calculator(instruction="").reset(PROBLEM) == PROBLEM.messages
    reply = f"First {call('calculator', expression='6 * 7')} and {call('calculator', expression='1 / 0')}"
    shown, done, rewards = environment.step(reply)
    assert (shown.text, shown.calls, shown.errors) == ("42\nerror: division by zero", 2, 1)
    assert (done, rewards) == (False, None), "the verifier's rule grades the last turn"
    shown, done, _ = environment.step("So \\boxed{42}.")
    assert done and not shown.text
    inside = f"<think>{call('calculator', expression='1')}</think>\\boxed{{42}}"
    assert environment.step(inside)[1], "what is thought is no call"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<tool_call>{</tool_call>", "the call is no JSON"),
        ("<tool_call>[1]</tool_call>", "a call is"),
        (call("search", query="x"), "there is no tool 'search'; the tool is calculator"),
        (call("calculator", value="1"), "no argument 'value'; known: expression"),
        (call("calculator"), "the argument expression is missing"),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "the call is no JSON"),
    ],
)
def test_calls_that_are_none(text: str, reason: str) -> None:
    shown, done, _ = Calculator().step(text)
    assert not done and shown.errors == 1 and shown.text.startswith(f"error: {reason}")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    file = tmp_path / "docs.jsonl"
    lines = [
        {"title": "Danube", "text": "The Danube flows through Vienna and Budapest."},
        {"title": "Rhine", "text": "The Rhine flows through Basel and Cologne."},
        {"text": "Seas carry salt water. " * 200},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_search_finds_passages_by_their_words(documents: Path) -> None:
    search = Search(str(documents), passages=1, characters=100)
    assert search.call({"query": "Which river flows through Vienna?"}).startswith("[1] Danube: The Danube flows")
    assert search.call({"query": "cologne AND NOT ("}) == "[1] Rhine: The Rhine flows through Basel and Cologne."
    assert "characters are left out" in search.call({"query": "carry water"})
    assert search.call({"query": "xyzzy"}) == "(nothing found)"
    with pytest.raises(ToolError, match="the query has no word"):
        search.call({"query": "?!"})


def test_the_index_is_made_again_when_the_documents_change(documents: Path) -> None:
    Search(str(documents))
    index = documents.with_name("docs.jsonl.fts.sqlite")
    made = index.stat().st_ino
    Search(str(documents))
    assert index.stat().st_ino == made
    documents.write_text(json.dumps({"text": "Only the Volga."}) + "\n")
    assert Search(str(documents)).call({"query": "volga"}) == "[1] Only the Volga."
    assert sorted(path.name for path in documents.parent.iterdir()) == ["docs.jsonl", "docs.jsonl.fts.sqlite"]


def test_documents_without_a_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "docs.jsonl"
    file.write_text('{"body": "x"}\n')
    with pytest.raises(UserError, match=r"docs.jsonl:1 = .*is no object with the field 'text'"):
        Search(str(file))
    with pytest.raises(UserError, match="environment.args.documents = .*absent.jsonl: No such file"):
        Search(str(tmp_path / "absent.jsonl"))


@pytest.mark.process
def test_programs_run_in_the_sandbox() -> None:
    if (reason := why_refused()) is not None:
        pytest.skip(f"this machine refuses namespaces: {reason}")
    tool = PythonTool(files={"data.txt": "6 7"}, seconds=5)
    code = "a, b = map(int, open('data.txt').read().split()); print(a * b + int(input()))"
    shown, done, _ = tool.step(call("python", code=code, stdin="8"))
    assert (shown.text, done, shown.errors) == ("50", False, 0)
    assert tool.call({"code": "raise SystemExit(3)"}) == "exit status 3"
    assert "ZeroDivisionError" in tool.call({"code": "1 / 0"})
    assert tool.call({"code": "x = 1"}) == "(no output)"
    assert "\ufffd" in tool.call({"code": "import sys; sys.stdout.buffer.write(b'\\xff\\xfe')"})
