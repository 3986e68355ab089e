"""Messages between the pool and its workers, over a socket pair that only they hold.

A frame is a 4-byte big-endian length and a pickle. Parent to worker: (rules, seconds, bytes) once, then one GradingItem
at a time. Worker to parent: READY once its rules are imported, then (reason or Judgement, detail) per item.
"""

from __future__ import annotations

import pickle
import struct
from typing import Any, BinaryIO

LENGTH = struct.Struct("!I")
READY = "ready"  # a worker's first reply


def frame(value: Any) -> bytes:
    """Encode one value."""
    body = pickle.dumps(value, protocol=5)
    return LENGTH.pack(len(body)) + body


def read_frame(stream: BinaryIO) -> Any:
    """Read the next value, None at the end of the stream. Blocks."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    body = stream.read(length)
    return pickle.loads(body) if len(body) == length else None


def take_frames(received: bytearray) -> list[Any]:
    """Remove the complete frames from the front of a buffer and return their values."""
    values = []
    while len(received) >= LENGTH.size:
        end = LENGTH.size + LENGTH.unpack_from(received)[0]
        if len(received) < end:
            break
        values.append(pickle.loads(received[LENGTH.size : end]))
        del received[:end]
    return values
