"""The end of a run: what its user saw, and the verdict on it; what must not come of a fault is an exception."""

from __future__ import annotations

import re
from dataclasses import dataclass


class Broken(AssertionError):
    """A promise that a fault broke."""

    outcome = "wrong result"


class Wrong(Broken):
    """The end is not that of a run without the fault, or what should be refused was not."""


class Hang(Broken):
    outcome = "hang"


class Lost(Broken):
    """A checkpoint that was whole is not there any more, or is not taken up."""

    outcome = "lost checkpoint"


class TracebackShown(Broken):
    """A user sees a traceback, or the bare name of a Python error."""

    outcome = "traceback"


_BARE = re.compile(r"Traceback \(most recent call last\)|(?:failed|error): (?:rank \d+: )?[\w.]*(?:Error|Exception)\b")


@dataclass(frozen=True)
class Ended:
    """The end of a run, and everything that its user saw."""

    code: int
    text: str
    seconds: float

    def __post_init__(self) -> None:
        if _BARE.search(self.text):
            raise TracebackShown(self.text[-2000:])

    def refused(self, pattern: str, code: int = 1) -> Ended:
        """Require this exit code, and exactly one line of an error, which matches."""
        told = [line for line in self.text.splitlines() if line.startswith(("error: ", "failed: "))]
        if self.code != code or len(told) != 1 or not re.search(pattern, told[0]):
            raise Wrong(f"exit code {self.code}, wanted {code} and /{pattern}/:\n{self.text[-2000:]}")
        return self

    def done(self, pattern: str = "") -> Ended:
        """Require the end of all steps, and a match of the pattern."""
        if self.code != 0 or "done: " not in self.text:
            raise Wrong(f"not done, exit code {self.code}:\n{self.text[-2000:]}")
        return self.told(pattern)

    def told(self, pattern: str) -> Ended:
        if not re.search(pattern, self.text):
            raise Wrong(f"nothing was printed like /{pattern}/:\n{self.text[-2000:]}")
        return self
