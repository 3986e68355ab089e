"""Meaning of a server's answer, or of its silence, in words.

The same for requests that a thread waits for (connection.py) and for those of the event loop (loop.py).
"""

from __future__ import annotations

import errno
import json
import os
from typing import Any

from owpo_megatron.engine.parsing import parse_answer
from owpo_megatron.errors import LIMITS, EngineError

BUSY = (429, 503)
BACK_OFF = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before a busy server is asked again


class EngineGone(EngineError):
    """The engine at `url` does not answer: it died, hangs or is unreachable. It needs a restart before a retry."""

    def __init__(self, url: str, what: str):
        super().__init__(f"engine {url}{what}")
        self.url, self._what = url, what

    def __reduce__(self) -> tuple[Any, ...]:  # an error of two arguments does not pickle by itself
        return type(self), (self.url, self._what)


class EngineWrong(EngineGone):
    """The engine at `url` answers, but not what it was asked for. It is treated as lost: restart, weights, retry."""


def answer_of(url: str, what: str, status: int, content: bytes) -> Any:
    """The content of an answer, as parsed; {"message": text} where it is no JSON.

    Args:
        what: path that was asked for; it follows the engine's URL in messages.

    Raises:
        EngineGone: the server failed, or is busy.
        EngineError: it refused.
    """
    if status >= 500 or status in BUSY:
        raise EngineGone(url, f"{what} failed with {status}: {_message(content)}")
    if status >= 400:
        raise EngineError(f"engine {url}{what} refused with {status}: {_message(content)}")
    try:
        return parse_answer(content)
    except ValueError:
        return {"message": content.decode(errors="replace")}


def silent(url: str, what: str, seconds: float) -> EngineGone:
    return EngineGone(url, f"{what} did not answer within {seconds:g} s")


def unconnected(url: str, what: str, seconds: float) -> EngineGone:
    return EngineGone(url, f"{what} is not reachable: no connection within {seconds:g} s")


def unreachable(url: str, what: str, error: BaseException) -> EngineError:
    """An EngineGone, but where this process may open no more connections: that is not the engine's fault."""
    number, reason = _reason(error)
    if number in (errno.EMFILE, errno.ENFILE):
        return EngineError(f"engine {url}{what} is not reachable: {reason}; {LIMITS[number]}")
    return EngineGone(url, f"{what} is not reachable: {reason}")


def _reason(error: BaseException) -> tuple[int, str]:
    """(errno or 0, reason): the system's words where it refused, those of the HTTP library otherwise."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno:
            words = os.strerror(cause.errno) if cause.errno > 0 else cause.strerror  # below 0: getaddrinfo's
            return cause.errno, f"[Errno {cause.errno}] {words}"
        cause = cause.__cause__
    return 0, str(error) or type(error).__name__


def _message(content: bytes) -> str:
    """Extract the server's error message from any of the formats it uses."""
    text = content.decode(errors="replace")
    try:
        found = json.loads(text)
    except ValueError:
        return text[:500].strip() or "no message"
    if isinstance(found, dict):
        found = found.get("error", found.get("message", found))
    if isinstance(found, dict):
        found = found.get("message", found)
    return str(found)[:500]
