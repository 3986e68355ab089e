"""Messages between the pool, the guard of a worker, and the worker, over socket pairs that only they hold.

A frame is a 4-byte big-endian length and a body. Pickles go one way only, from the pool outwards: (rules, memory) once,
then items. What comes back is JSON, because a worker runs code that nobody here has written. An item carries a number
and a nonce that its reply repeats, so that no process that is left from an earlier item can answer for it.

    pool -> guard     END or LOST + the worker's number: kill it with all that it started, and fork another;
                      LOST: and report how it died
    guard -> pool     {"worker": number}, with the pool's end of a socket to it: there is a new one; {"died": how}
    pool -> worker    pickle of (number, nonce, item)
    worker -> pool    {"number", "nonce", "verdict", "detail"}
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from typing import Any, BinaryIO, get_args

from owpo_megatron.types import Judgement, VerdictReason

LENGTH = struct.Struct("!I")
END, LOST = b"e", b"l"
MAX_REPLY = 2**20  # bytes; a longer one is no reply of the worker's own code
_REASONS = frozenset(get_args(VerdictReason))


def frame(body: bytes) -> bytes:
    """Encode one body."""
    return LENGTH.pack(len(body)) + body


def told(**values: Any) -> bytes:
    """A frame that holds a JSON object."""
    return frame(json.dumps(values).encode())


def read_frame(stream: BinaryIO) -> bytes | None:
    """Read the next body, None at the end of the stream. Blocks."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    body = stream.read(length)
    return body if len(body) == length else None


def take_frames(received: bytearray, longest: int = MAX_REPLY) -> list[bytes]:
    """Remove the complete frames from the front of a buffer and return their bodies.

    Raises:
        ValueError: a frame is longer than `longest`.
    """
    bodies = []
    while len(received) >= LENGTH.size:
        (length,) = LENGTH.unpack_from(received)
        if length > longest:
            raise ValueError(f"a frame of {length} bytes")
        end = LENGTH.size + length
        if len(received) < end:
            break
        bodies.append(bytes(received[LENGTH.size : end]))
        del received[:end]
    return bodies


def plain(said: VerdictReason | Judgement) -> Any:
    """A rule's reason or judgement, as JSON has it."""
    return asdict(said) if isinstance(said, Judgement) else said


def judged(said: Any) -> VerdictReason | Judgement:
    """A rule's reason or judgement, from JSON.

    Raises:
        ValueError: no rule returns that.
    """
    if isinstance(said, dict) and said.keys() == {"reason", "score", "parts", "detail"} and said["reason"] in _REASONS:
        return Judgement(**said)
    if isinstance(said, str) and said in _REASONS:
        return said  # type: ignore[return-value]
    raise ValueError(f"a rule returned {said!r}")
