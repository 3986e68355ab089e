"""Python programs of the policy, run in the verifier's sandbox: no network, no files but their own."""

from __future__ import annotations

from collections.abc import Mapping

from owpo_megatron.environments.tools import ToolEnvironment
from owpo_megatron.environments.worker import shortened
from owpo_megatron.verifiers.sandbox import PYTHON, Isolation, Limits, Outcome, require, run

MIB = 2**20
SHOWN = 8000  # characters of stdout, and of stderr


class PythonTool(ToolEnvironment):
    """Runs a program and shows what it wrote and how it ended. Programs share nothing but the given files.

    With the verifier's rule `code` the last reply's block of code is graded by the problem's tests.

    Args:
        files: contents of files in the program's folder, by name.
        seconds, memory_mb, processes: limits of one program.
        isolation: as `verifier.sandbox`.

    Raises:
        UserError: this machine refuses the isolation.
    """

    name = "python"
    description = "Runs a Python program and returns what it prints."
    parameters: Mapping[str, str] = {"code": "the program", "stdin": "what it reads from standard input"}

    def __init__(
        self,
        files: Mapping[str, str] | None = None,
        seconds: float = 5.0,
        memory_mb: int = 512,
        processes: int = 16,
        isolation: Isolation = "namespaces",
        instruction: str | None = None,
    ):
        super().__init__(instruction)
        require(isolation)
        self._files, self._isolation = dict(files or {}), isolation
        self._limits = Limits(
            seconds, cpu_seconds=seconds, memory_bytes=memory_mb * MIB, processes=processes, output_bytes=MIB
        )

    def call(self, arguments: Mapping[str, str]) -> str:
        files: dict[str, bytes | str] = {**self._files, "main.py": arguments["code"].encode("utf-8", "replace")}
        stdin = arguments.get("stdin", "").encode("utf-8", "replace")
        command = [PYTHON, "-I", "-B", "main.py"]
        return shown(run(command, files, stdin, self._limits, self._isolation))


def shown(outcome: Outcome) -> str:
    """The outcome as the policy reads it; a program that fails is a result, not an error of the tool."""
    stdout, stderr = (shortened(part.decode("utf-8", "replace"), SHOWN) for part in (outcome.stdout, outcome.stderr))
    ends = {
        "exit": f"exit status {outcome.code}",
        "signal": f"ended by signal {outcome.code}",
        "timeout": "killed: it took too long",
        "memory": "killed: it used too much memory",
        "processes": "killed: it started too many processes",
        "output": "killed: it wrote too much",
        "refused": f"not started: {outcome.detail}",
    }
    parts = [stdout, stderr and f"stderr:\n{stderr}", "" if outcome.ok else ends[outcome.reason]]
    return "\n".join(part.rstrip("\n") for part in parts if part) or "(no output)"
