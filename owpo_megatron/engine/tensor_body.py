"""JSON body of a weight update by tensors, encoded while it is sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pybase64

CHUNK = 3 << 18  # bytes encoded at a time: a multiple of 3, so that the pieces of base64 can be concatenated
START, BETWEEN, END = b'{"serialized_named_tensors": ["', b'", "', b'"], "flush_cache": false'


class TensorBody:
    """Body of POST /update_weights_from_tensor.

    Iterating encodes piece by piece: the body is never in memory as a whole, and the pieces are small enough to be sent
    at once (the connection copies the rest of a piece after every partial send).

    Args:
        payloads: one pickle per tensor-parallel rank.
        load_format: what the pickles hold, by SGLang's name; None: [(name, tensor), ...].
    """

    def __init__(self, payloads: Sequence[bytes], load_format: str | None = None):
        self._payloads = payloads
        self._end = END + (f', "load_format": "{load_format}"}}' if load_format else "}").encode()
        encoded = sum(4 * -(-len(payload) // 3) for payload in payloads)
        self._length = len(START) + len(BETWEEN) * (len(payloads) - 1) + len(self._end) + encoded

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[bytes]:
        for index, payload in enumerate(self._payloads):
            yield BETWEEN if index else START
            view = memoryview(payload)
            for start in range(0, len(view), CHUNK):
                yield pybase64.b64encode(view[start : start + CHUNK])
        yield self._end
