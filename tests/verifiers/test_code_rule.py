"""The rule `code`: programs that are right, partly right, wrong, hostile, and those that want to be thought right."""

from __future__ import annotations

import json

import pytest

from owpo_megatron.config import VerifierConfig
from owpo_megatron.errors import UserError
from owpo_megatron.types import GradingItem, Judgement
from owpo_megatron.verifiers import make_verifier
from owpo_megatron.verifiers.code import CodeRule, CodeTest, code_in, read_tests
from owpo_megatron.verifiers.sandbox import isolation, why_refused

pytestmark = pytest.mark.process

SQUARES = json.dumps({"inputs": ["2\n", "3\n", "-4\n", "0\n"], "outputs": ["4\n", "9\n", "16\n", "0\n"]})
ASSERTS = "import math\nassert square(2) == 4\nassert square(3) == 9\nassert math.isclose(square(0.5), 0.25)"
CALLS = json.dumps({"inputs": [[2], [3]], "outputs": [4, 9], "fn_name": "square"})
RULE = CodeRule(isolation="process", seconds=20)


def grade(code: str, answer: str, rule: CodeRule = RULE):
    return rule(GradingItem(f"Here it is:\n```python\n{code}\n```\n", answer))


@pytest.mark.parametrize(
    ("code", "answer", "score"),
    [
        ("print(int(input()) ** 2)", SQUARES, 1.0),
        ("print(str(int(input()) ** 2) + '  \\n\\n')", SQUARES, 1.0),
        ("print(int(input()) * 2)", SQUARES, 0.5),  # 2 and 0
        ("print(abs(int(input())) ** 3)", SQUARES, 0.25),
        ("n = int(input())\nassert n > 0\nprint(n * n)", SQUARES, 0.5),
        ("print(", SQUARES, 0.0),
        ("def square(x): return x * x", ASSERTS, 1.0),
        ("def square(x): return x * 2", ASSERTS, 1 / 3),
        ("def square(x): return x ** 3 if x == 3 else x * x", ASSERTS, 2 / 3),
        ("square = lambda x: x * x", json.dumps(ASSERTS.split("\n")[1:3]), 1.0),
        ("class Solution:\n def square(self, x): return x * x", CALLS, 1.0),
        ("def square(x): return x + 2", CALLS, 0.5),
        ("def pair(x): return (x, x)", json.dumps({"inputs": [[2]], "outputs": [[2, 2]], "fn_name": "pair"}), 1.0),
    ],
)
def test_the_score_is_the_share_of_passed_tests(code, answer, score):
    assert grade(code, answer) == Judgement("ok" if score == 1 else "wrong", score)


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import sys; sys.stdin.readline(); print('0' * 32); sys.exit(0)",
        "import sys; print(open('test.py').read()); sys.exit(0)",
        "def square(x):\n class All:\n  def __eq__(self, other): import os; os._exit(0)\n return All()",
        "import builtins; builtins.__dict__['AssertionError'] = SystemExit\ndef square(x): return -1",
    ],
)
def test_ending_early_passes_nothing(code):
    assert grade(code, ASSERTS).score == 0 and grade(code, CALLS).score == 0


def test_a_hang_in_one_test_costs_that_test():
    code = "n = int(input())\nwhile n == 3: pass\nprint(n * n)"
    result = grade(code, SQUARES, CodeRule("process", seconds=8))
    assert result == Judgement("wrong", 0.75)


def test_too_little_time_for_all_tests_judges_nothing():
    answer = json.dumps({"inputs": ["1"] * 400, "outputs": ["1"] * 400})
    assert grade("print(1)", answer, CodeRule("process", seconds=3)) == "timeout"


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("```python\na\n```\ntext\n```py\nb\n```", "b\n"),
        ("```\na\n```", "a\n"),
        ("```cpp\nint a;\n```", None),
        ("```python\na\n```\n```bash\nls\n```", "a\n"),
        ("<think>```python\na\n```</think> none", None),
        ("<think>```python\na\n```", None),
        ("<think>x</think>```python\nb", "b"),
        ("no code", None),
        ("```python\n \n```", None),
    ],
)
def test_which_code(response, code):
    assert code_in(GradingItem(response, "")) == code


def test_no_code_and_too_much():
    assert RULE(GradingItem("I cannot.", SQUARES)) == Judgement("no_answer", 0.0)
    assert grade("#" * 70_000, SQUARES) == Judgement("too_long", 0.0)


@pytest.mark.parametrize(
    "answer",
    ["", "[]", "{}", "42", "x = 1", "assert", '{"inputs": ["1"], "outputs": []}', '{"inputs": "1", "outputs": "1"}',
     '["assert True", 3]', '{"inputs": [[1]], "outputs": [1], "fn_name": "a b"}'],
)  # fmt: skip
def test_an_answer_without_tests_is_an_error(answer):
    with pytest.raises(ValueError, match="tests|fn_name"):
        read_tests(answer)


def test_forms_of_tests():
    assert read_tests(SQUARES)[0] == CodeTest("2\n", "4\n")
    assert read_tests('{"inputs": [["1", "2"]], "outputs": [["3"]]}') == [CodeTest("1\n2", "3")]
    assert [test.statement for test in read_tests(ASSERTS)][0] == "import math\nassert square(2) == 4"
    assert read_tests(json.dumps(ASSERTS)) == read_tests(ASSERTS)


@pytest.mark.skipif("why_refused() is not None", reason="this machine refuses namespaces")
def test_through_the_pool_in_namespaces(tmp_path):
    """A program that spies, one that stays, one that is right: scores arrive, and nothing leaves the sandbox."""
    assert why_refused() is None
    secret = tmp_path / "secret"
    secret.write_text("4")
    spy = f"import os\nprint(open({str(secret)!r}).read())"
    daemon = "import os, time\nif os.fork() == 0:\n os.setsid(); time.sleep(60)\nprint(int(input()) ** 2, flush=True)"
    verifier = make_verifier(VerifierConfig(rule="code", timeout=60), ["default"])
    try:
        items = [GradingItem(f"```python\n{code}\n```", SQUARES) for code in (spy, daemon, "print(int(input()) ** 2)")]
        verdicts = verifier.score(items)
    finally:
        verifier.close()
    assert [(verdict.reason, verdict.score) for verdict in verdicts] == [("wrong", 0.0), ("ok", 1.0), ("ok", 1.0)]


def test_where_namespaces_are_refused_the_rule_is(monkeypatch):
    monkeypatch.setattr(isolation, "why_refused", lambda: "unshare: Operation not permitted")
    with pytest.raises(UserError, match="verifier.sandbox = namespaces: this machine refuses them"):
        make_verifier(VerifierConfig(rule="code"), ["default"])
    make_verifier(VerifierConfig(rule="code", sandbox="process", workers=1), ["default"]).close()
