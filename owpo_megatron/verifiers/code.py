"""The rule `code`: runs the program in a response against tests, in the sandbox; the score is the share that passes.

The answer of such a problem holds its tests, in one of three forms:

    {"inputs": [...], "outputs": [...]}              stdin and the expected stdout, as APPS, TACO and CodeContests
    {"inputs": [[1, 2]], "outputs": [3], "fn_name": "add"}    calls; a method of `Solution` counts, too
    ["assert add(1, 2) == 3", ...], or the lines as a text    assertions, as MBPP

A text may be JSON of these. Each test is a run of its own. What a program prints is compared outside of it. A call or
an assertion has to run inside; it counts only if a token is printed after it that the program was not given, so that
sys.exit(0) passes nothing. Code that searches the interpreter's frames for the token could still find it.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import time
from dataclasses import dataclass
from typing import Any

from owpo_megatron.types import GradingItem, Judgement, VerdictReason
from owpo_megatron.verifiers.opening import conclusion, opening_of
from owpo_megatron.verifiers.sandbox import PYTHON, Isolation, Limits, Outcome, run

MAX_CODE = 65536  # characters
CPU_OF_ONE, CLOCK_OF_ONE = 0.25, 0.5  # shares of the rule's time that one test may take
MEMORY_BYTES = 2**30
_BLOCK = re.compile(r"```[ \t]*([A-Za-z0-9+#._-]*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_PYTHON = ("", "python", "python3", "py")
_COMMAND = [PYTHON, "-E", "-s", "-B"]
_HARNESS = """
import sys
def check():
    token = sys.stdin.readline()
    space = {"__name__": "solution"}
    exec(compile(open("solution.py").read(), "solution.py", "exec"), space)
    def same(found, expected):
        if isinstance(found, (list, tuple)) and isinstance(expected, (list, tuple)):
            return len(found) == len(expected) and all(map(same, found, expected))
        return found == expected
    def called(name):
        return space[name] if name in space else getattr(space["Solution"](), name)
    space |= {"same__": same, "called__": called}
    exec(compile(open("test.py").read(), "test.py", "exec"), space)
    sys.__stdout__.write("\\n" + token)
    sys.__stdout__.flush()
check()
"""


@dataclass(frozen=True)
class CodeTest:
    """One test: what the program reads and has to print, or a statement that has to hold."""

    stdin: str = ""
    stdout: str = ""
    statement: str = ""


@dataclass(frozen=True)
class CodeRule:
    """Grades Python programs.

    Args:
        isolation: isolation of the programs.
        seconds: time for all tests of a response together.
    """

    isolation: Isolation = "namespaces"
    seconds: float = 3.5

    def __call__(self, item: GradingItem) -> VerdictReason | Judgement:
        """`timeout` where the tests did not all fit into the time though none took its share: that judges nothing.

        Raises:
            ValueError: the answer holds no tests.
            RuntimeError: the sandbox did not start a program.
        """
        tests = read_tests(item.answer)
        code = code_in(item)
        if code is None:
            return Judgement("no_answer", 0.0)
        if len(code) > MAX_CODE:
            return Judgement("too_long", 0.0)
        passed, was_slow, began = 0, False, time.monotonic()
        for test in tests:
            left = began + self.seconds - time.monotonic()
            outcome, token = self._outcome(code, test, min(left, self.seconds * CLOCK_OF_ONE))
            if outcome.reason == "timeout" and left < self.seconds * CLOCK_OF_ONE:
                if not was_slow:
                    return "timeout"
                break
            was_slow = was_slow or outcome.reason == "timeout"
            passed += _passes(outcome, test, token)
        return Judgement("ok" if passed == len(tests) else "wrong", passed / len(tests))

    def _outcome(self, code: str, test: CodeTest, seconds: float) -> tuple[Outcome, str]:
        limits = Limits(max(0.0, seconds), self.seconds * CPU_OF_ONE, MEMORY_BYTES)
        token = secrets.token_hex(16)
        if test.statement:
            files = {"solution.py": code, "test.py": test.statement, "harness.py": _HARNESS}
            outcome = run([*_COMMAND, "harness.py"], files, token.encode(), limits, self.isolation)
        else:
            outcome = run([*_COMMAND, "main.py"], {"main.py": code}, test.stdin.encode(), limits, self.isolation)
        if outcome.reason == "refused":
            raise RuntimeError(f"the sandbox did not start: {outcome.detail}")
        return outcome, token


def code_in(item: GradingItem) -> str | None:
    """The last Python block behind the reasoning; for an item that is an answer already, all of it."""
    if item.form == "answer":
        return item.response
    text = conclusion(item.response, opening_of(item.prompt))
    blocks = [block[2] for block in _BLOCK.finditer(text) if block[1].lower() in _PYTHON]
    return blocks[-1] if blocks and blocks[-1].strip() else None


def read_tests(answer: str) -> list[CodeTest]:
    """The tests that an answer holds.

    Raises:
        ValueError: none.
    """
    try:
        value = json.loads(answer)
    except ValueError:
        value = answer
    if isinstance(value, str):
        value = _statements(value)
    if isinstance(value, dict):
        tests = _pairs(value)
    else:
        tests = [CodeTest(statement=one) for one in value if isinstance(one, str)] if isinstance(value, list) else []
    if not tests or (isinstance(value, list) and len(tests) != len(value)):
        raise ValueError("the answer holds no tests: give inputs and outputs, or assertions (docs/verifier.md)")
    return tests


def _pairs(value: dict[str, Any]) -> list[CodeTest]:
    inputs, outputs, name = value.get("inputs"), value.get("outputs"), value.get("fn_name")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise ValueError("the tests need lists of inputs and outputs of the same length")
    if name is None:
        return [CodeTest(_text(given), _text(expected)) for given, expected in zip(inputs, outputs, strict=True)]
    if not str(name).isidentifier():
        raise ValueError(f"fn_name is {name!r}, no name of a function")
    return [
        CodeTest(statement=f"assert same__(called__({name!r})(*{list(given)!r}), {expected!r})")
        for given, expected in zip(inputs, outputs, strict=True)
    ]


def _statements(text: str) -> list[str]:
    """The top-level statements of a text, each with those before it that assert nothing (imports, helpers)."""
    try:
        parts = ast.parse(text).body
    except SyntaxError as error:
        raise ValueError(f"the tests are no Python: {error}") from error
    shared = [ast.unparse(part) for part in parts if not isinstance(part, ast.Assert)]
    return ["\n".join([*shared, ast.unparse(part)]) for part in parts if isinstance(part, ast.Assert)]


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _passes(outcome: Outcome, test: CodeTest, token: str) -> bool:
    text = outcome.stdout.decode(errors="replace")
    if not outcome.ok:
        return False
    if test.statement:
        return text.endswith("\n" + token)
    return [line.rstrip() for line in text.rstrip().splitlines()] == [
        line.rstrip() for line in test.stdout.rstrip().splitlines()
    ]
