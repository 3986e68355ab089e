"""JSON of an engine's answers.

An answer of 8,192 tokens has as many lists of a log-prob, an id and null. As lists they cost more in Python's garbage
collector than in the parser, so they are made one flat list first.
"""

from __future__ import annotations

import json
from typing import Any

import orjson

_KEY = b'"output_token_logprobs":['  # never inside of a JSON string, where the quotes would be escaped
_BETWEEN = b",null],["


def parse_answer(content: bytes) -> Any:
    """The content of an answer; the lists of `output_token_logprobs` come as [logp, id, logp, id, ...] where they can.

    Raises:
        ValueError: it is no JSON.

    Example:
        >>> parse_answer(b'{"output_token_logprobs":[[-0.5,11,null],[-1.25,2,null]],"output_ids":[11,2]}')
        {'output_token_logprobs': [-0.5, 11, -1.25, 2], 'output_ids': [11, 2]}
    """
    try:
        return orjson.loads(flattened(content))
    except ValueError:
        return json.loads(content)  # takes what is beyond the standard, as NaN


def flattened(content: bytes) -> bytes:
    """The same JSON with flat log-probs wherever each entry is [number, number, null], written without spaces."""
    parts, start = [], 0
    while (begin := content.find(_KEY + b"[", start)) >= 0:
        first = begin + len(_KEY) + 1
        end = content.find(b",null]]", first)
        entries = content[first:end] if end >= 0 else b"["
        flat = entries.replace(_BETWEEN, b",")
        between = (len(entries) - len(flat)) // (len(_BETWEEN) - 1)
        if b"[" in flat or b'"' in flat or b"{" in flat or flat.count(b",") != 2 * between + 1:
            parts.append(content[start:first])  # left as it is: the parser sees what is wrong with it
            start = first
            continue
        parts += [content[start:begin], _KEY, flat, b"]"]
        start = end + len(b",null]]")
    return b"".join([*parts, content[start:]])


def columns(logprobs: list[Any]) -> tuple[list[Any], list[Any]]:
    """(log-probs, ids) of `output_token_logprobs`, flat or not.

    Raises:
        TypeError, IndexError: its entries are something else.
    """
    if logprobs and not isinstance(logprobs[0], (list, tuple)):
        return logprobs[0::2], logprobs[1::2]
    return [entry[0] for entry in logprobs], [entry[1] for entry in logprobs]
